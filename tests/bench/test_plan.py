from __future__ import annotations

import pytest

from prefopt.bench.plan import make_plan
from prefopt.config.load import validated
from prefopt.config.models import SuiteConfig
from prefopt.config.yaml import apply_overrides, parse
from prefopt.errors import ConfigError

SUITE = """\
prefopt: 1
name: small
seeds: [0, 1]
baseline: sft
stages:
  sft:
    model: {path: "world:replies"}
    data: {source: replies, size: 20}
    algorithm: {name: sft}
base:
  model: {path: "stage:sft"}
  data: {source: replies, format: comparisons, size: 20}
  algorithm: {name: dpo}
  optim: {lr: 1e-3}
methods:
  - {label: SFT, stage: sft}
  - {label: DPO}
  - {label: RM, algorithm: {name: reward_model}, best_of: 4}
tasks: [{name: length}]
held_out: {source: replies, format: comparisons, size: 20, split: held_out}
"""


def plan(plugins, tmp_path, *overrides: str):
    document = apply_overrides(parse(SUITE, "suite.yaml"), overrides)
    return make_plan(validated(SuiteConfig, document, plugins.find), document, tmp_path, plugins.find)


def test_stages_are_shared_and_cells_are_method_by_seed(plugins, tmp_path):
    made = plan(plugins, tmp_path)
    assert [job.title for job in made.jobs.values()] == [
        "sft, seed 0",
        "DPO, seed 0",
        "RM, seed 0",
        "sft, seed 1",
        "DPO, seed 1",
        "RM, seed 1",
    ]
    assert [(c.label, c.algorithm, c.seed, c.best_of) for c in made.cells[:3]] == [
        ("SFT", "sft", 0, None),
        ("DPO", "dpo", 0, None),
        ("RM", "reward_model", 0, 4),
    ]
    sft, dpo = (made.jobs[c.job] for c in made.cells[:2])
    assert dpo.needs == (sft.key,)
    assert dpo.config.model.path == str(tmp_path / "store" / sft.key / "model")
    assert dpo.config.run.dir == str(tmp_path / "store" / dpo.key)
    assert [job.config.run.seed for job in made.jobs.values()] == [0, 0, 0, 1, 1, 1]


def test_what_the_baseline_cost_is_not_counted(plugins, tmp_path):
    made = plan(plugins, tmp_path)
    sft, dpo, _ = made.cells[:3]
    assert made.counted(sft) == []
    assert made.counted(dpo) == [dpo.job]
    assert made.chain(dpo.job) == [sft.job, dpo.job]


def test_axes_multiply_methods_but_not_stages(plugins, tmp_path):
    made = plan(plugins, tmp_path, "seeds=[0]", "axes={optim.lr: [1e-3, 1e-4], optim.batch_size: [8]}")
    found = [(c.label, dict(c.settings)) for c in made.cells]
    settings = [{"optim.lr": lr, "optim.batch_size": 8} for lr in (1e-3, 1e-4)]
    assert found == [("SFT", {}), *(("DPO", s) for s in settings), *(("RM", s) for s in settings)]
    assert {made.jobs[c.job].config.optim.lr for c in made.cells if c.label == "DPO"} == {1e-3, 1e-4}


def test_a_run_is_known_by_its_content(plugins, tmp_path):
    first, again = plan(plugins, tmp_path), plan(plugins, tmp_path / "elsewhere")
    assert list(first.jobs) == list(again.jobs)
    assert [c.job for c in first.cells] == [c.job for c in again.cells]
    other = plan(plugins, tmp_path, "base.optim.lr=2e-3")
    same = [a.job == b.job for a, b in zip(first.cells, other.cells, strict=True)]
    assert same == [True, False, False] * 2
    deeper = plan(plugins, tmp_path, "stages.sft.data.size=21")
    assert not set(deeper.jobs) & set(first.jobs)  # what builds on another stage is another run


def test_a_run_is_other_work_when_its_data_change_under_the_same_name(plugins, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}\n")
    over = f"base.data={{source: jsonl, path: {data}}}"
    first = plan(plugins, tmp_path, over)
    data.write_text('{"prompt": "p"}\n')
    second = plan(plugins, tmp_path, over)
    same = [a.job == b.job for a, b in zip(first.cells, second.cells, strict=True)]
    assert same == [True, False, False] * 2


def test_what_looks_like_a_secret_is_still_what_is_run(plugins, tmp_path, monkeypatch):
    monkeypatch.setenv("MADE_UP_TOKEN", tmp_path.name)
    data = str(tmp_path / "pairs.jsonl")
    made = plan(plugins, tmp_path, f"base.data={{source: jsonl, path: {data}}}", "methods=[{label: DPO}]", "seeds=[0]")
    assert made.jobs[made.cells[0].job].config.data.source.path == data


def test_the_short_form_of_an_algorithm_is_the_long_one(plugins, tmp_path):
    long = plan(plugins, tmp_path, "methods=[{algorithm: {name: reward_model, centre: 0.1}, best_of: 4}]")
    over = "methods=[{algorithm: reward_model, best_of: 4}]"
    assert [c.job for c in plan(plugins, tmp_path, over, "base.algorithm={name: reward_model, centre: 0.1}").cells] == [
        c.job for c in long.cells
    ]
    made = plan(plugins, tmp_path, "base.algorithm=sft", "methods=[{algorithm: dpo}]", "axes={algorithm.beta: [0.5]}")
    assert {made.jobs[c.job].config.algorithm.beta for c in made.cells} == {0.5}
    made = plan(plugins, tmp_path, "methods=[{label: x}]", "axes={algorithm: [dpo, sft]}")
    assert [made.jobs[c.job].config.algorithm.name for c in made.cells[:2]] == ["dpo", "sft"]


def test_the_same_method_twice_is_one(plugins, tmp_path):
    assert len(plan(plugins, tmp_path, "methods=[{label: DPO}, {label: DPO}]", "seeds=[0]").cells) == 1


def test_a_pooled_row_is_located_in_the_file(plugins, tmp_path):
    text = SUITE.replace("{label: DPO}", "{label: SFT}")
    document = parse(text, "suite.yaml")
    with pytest.raises(ConfigError, match="suite.yaml:17:6: another method is called `SFT` too"):
        make_plan(validated(SuiteConfig, document, plugins.find), document, tmp_path, plugins.find)


@pytest.mark.parametrize(
    ("override", "words", "where"),
    [
        ("world={name: replies}", "unknown key `world`", "override `world`"),
        ("baseline=dpo", "baseline `dpo` is not a stage", "override `baseline`"),
        ('base.model.path="stage:none"', "there is no stage `none` before this run", "override `base.model.path`"),
        ("methods.0.stage=none", "there is no stage `none`", "override `methods.0.stage`"),
        ("base.run.seed=3", "`run.seed` is set by the suite", "override `base.run.seed`"),
        ("base.optim.lr=-1", "must be greater than 0", "override `base.optim.lr`"),
        ("base.optm.lr=1", "unknown key `optm`", "override `base.optm.lr`"),
        ("methods.2.best_of=1", "at least 2", "override `methods.2.best_of`"),
        ("methods.1.best_of=4", "exactly when it trains a reward model", "suite.yaml:17:5"),
        ("axes={optim.lr: [x]}", "`optim.lr` must be a valid number", "override `axes`"),
        ("methods.1.algorithm.name=dop", "unknown algorithm `dop`", "override `methods.1.algorithm.name`"),
        ("methods.1.label=SFT", "another method is called `SFT` too", "override `methods.1.label`"),
        ("methods=[{algorithm: {beta: 0.1}}, {algorithm: {beta: 0.5}}]", "is called `dpo` too", "override `methods`"),
        ("methods=[{algorithm: 3}]", "`algorithm` is a section", "override `methods`"),
        ("methods=[{algorithm: dop}]", "unknown algorithm `dop`", "override `methods`"),
        ("methods=[{label: [DPO]}]", "`label` must be text", "override `methods`"),
        ("methods=[{stage: 3}]", "`stage` must be text", "override `methods`"),
        ("methods.0.optim={lr: 1e-3}", "`optim` does nothing beside `stage`", "override `methods.0.optim`"),
        ("methods.2.best_of=true", "at least 2", "override `methods.2.best_of`"),
        ("base.run=3", "`run` is a section", "override `base.run`"),
        ("base.optim=3", "`optim` is a section", "override `base.optim`"),
        ("stages.sft.run=x", "`run` is a section", "override `stages.sft.run`"),
        ("base.plugins={allow: [x]}", "`plugins` is set by the suite", "override `base.plugins`"),
        ("axes={algorithm.name.x: [1]}", "`algorithm.name.x` leads nowhere", "override `axes`"),
        ("axes={algorithm.beta.0: [1]}", "leads nowhere", "override `axes`"),
        ("axes={optim.betas.x: [1]}", "leads nowhere", "override `axes`"),
        ("axes={run: [3]}", "`run` is a section", "override `axes`"),
        ("axes={run.seed: [3]}", "`run.seed` is set by the suite", "override `axes`"),
        ("axes={'': [3]}", "unknown key ``", "override `axes`"),
    ],
)
def test_what_is_wrong_in_a_suite_is_located(plugins, tmp_path, override, words, where):
    with pytest.raises(ConfigError) as caught:
        plan(plugins, tmp_path, "base.optim.betas=[0.9, 0.99]", "base.algorithm.beta=0.2", override)
    problem = caught.value.problems[0]
    assert words in problem.what
    assert problem.where == where


LABELS = """\
stages.labels={kind: label, model: {path: "stage:sft"}, data: {source: replies, format: prompts, size: 9}, n: 2,
judge: {name: gold, reward: {name: replies_gold}}}"""
LEARNING = 'methods.1={label: DPO, data: {source: jsonl, path: "stage:labels"}}'


def test_a_cell_pays_for_the_rows_it_learns_from(plugins, tmp_path):
    made = plan(plugins, tmp_path, "seeds=[0]", LABELS, LEARNING)
    sft, dpo, reward = made.cells
    labels = next(job for job in made.jobs.values() if job.title == "labels, seed 0")
    assert made.jobs[dpo.job].needs == (sft.job, labels.key)
    assert made.jobs[dpo.job].config.data.source.path == str(tmp_path / "store" / labels.key / "rows.jsonl")
    assert made.counted(dpo) == [labels.key, dpo.job]
    assert made.counted(reward) == [reward.job]


def test_another_judge_is_another_cell(plugins, tmp_path):
    other = LABELS.replace("replies_gold}", "replies_gold}, mistakes: 0.2")
    keys = [plan(plugins, tmp_path, "seeds=[0]", labels, LEARNING).cells[1].job for labels in (LABELS, other)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("methods.1={label: x, stage: labels}", "`stage` wants a model, and stage `labels` makes rows"),
        ("baseline=labels", "wants a model, and stage `labels` makes rows"),
        ("methods.1.kind=sample", "`kind`"),
        ('methods.1.data={source: jsonl, path: "stage:sft"}', "`data.path` wants rows, and stage `sft` makes a model"),
    ],
)
def test_rows_are_no_model_in_a_suite_either(plugins, tmp_path, override, words):
    with pytest.raises(ConfigError) as caught:
        plan(plugins, tmp_path, LABELS, LEARNING, override)
    assert words in caught.value.problems[0].what
