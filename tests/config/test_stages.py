"""Pipelines: what is shared, what a stage may refer to, and where errors are said to be."""

from __future__ import annotations

import pytest

from prefopt.config import stages_of
from prefopt.config.stages import makes
from prefopt.config.yaml import parse
from prefopt.errors import ConfigError
from prefopt.rows import Comparison

TEXT = """\
prefopt: 1
data: {source: replies, size: 9}
optim: {lr: 0.1, batch_size: 3}
run: {dir: runs/all, seed: 4}
stages:
  - name: first
    model: {path: "world:replies"}
    algorithm: {name: sft}
    optim: {lr: 0.2}
  - name: second
    kind: train
    model: {path: "stage:first"}
    algorithm: {name: reward_model}
    data: {source: replies, format: comparisons}
"""


def stages(plugins, text=TEXT):
    return stages_of(parse(text, "all.yaml"), plugins.find)


def test_stages_share_what_stands_beside_them_and_lay_their_own_over_it(plugins):
    first, second = stages(plugins)
    assert (first.config.optim.lr, first.config.optim.batch_size) == (0.2, 3)
    assert (second.config.optim.lr, second.config.run.seed) == (0.1, 4)
    assert [s.config.run.dir for s in (first, second)] == ["runs/all/first", "runs/all/second"]
    assert second.config.model.path == first.product == "runs/all/first/model"
    assert second.config.data.source.format == "comparisons"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stage:first", "stage:third", r"all.yaml:12:13: there is no stage `third` before this run\n.*Stages: first\."),
        ("world:replies", "stage:second", r"all.yaml:7:13: there is no stage `second` before this run\n.*none yet"),
        ("name: second", "name: first", r"all.yaml:10:5: two stages are called `first`"),
        ("name: second", "name: Second!", r"all.yaml:10:5: a stage has a `name`"),
        ("kind: train", "kind: trian", r"all.yaml:11:5: unknown kind of stage `trian`\n.*train"),
        ("optim: {lr: 0.2}", "run: {dir: x}", r"all.yaml:9:11: `run.dir` stands beside `stages`"),
        ("optim: {lr: 0.2}", "optim: {lrr: 0.2}", r"all.yaml:9:13: unknown key `optim.lrr`"),
        ("run: {dir: runs/all, seed: 4}", "run: {seed: 4}", r"`run.dir` stands beside `stages`"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(plugins, old, new, message):
    assert old in TEXT
    with pytest.raises(ConfigError, match=message):
        stages(plugins, TEXT.replace(old, new))


@pytest.mark.parametrize("listed", ["stages: []", "stages: {a: 1}", "stages: 3"])
def test_stages_are_a_list(plugins, listed):
    with pytest.raises(ConfigError, match="`stages` is a list of runs"):
        stages(plugins, f"prefopt: 1\nrun: {{dir: x}}\n{listed}\n")


ROWS = """\
prefopt: 1
model: {path: "stage:sft"}
data: {source: replies, format: prompts, size: 9}
optim: {lr: 0.1}
run: {dir: runs/all, seed: 4, steps: 3, threads: 2}
stages:
  - name: sft
    model: {path: "world:replies"}
    algorithm: {name: sft}
  - name: labels
    kind: label
    n: 2
    judge: {name: gold, reward: {name: replies_gold}}
  - name: dpo
    data: {source: jsonl, path: "stage:labels"}
    algorithm: {name: dpo}
"""


def test_a_stage_that_makes_rows_takes_of_what_is_shared_what_it_knows(plugins):
    sft, labels, dpo = stages(plugins, ROWS)
    assert (labels.config.kind, labels.config.n, labels.config.judge.name) == ("label", 2, "gold")
    assert (labels.config.run.dir, labels.config.run.seed, labels.config.run.threads) == ("runs/all/labels", 4, 2)
    assert labels.config.model.path == dpo.config.model.path == sft.product
    assert dpo.config.data.source.path == labels.product == "runs/all/labels/rows.jsonl"
    assert makes(sft.config) is None
    assert makes(labels.config) is Comparison


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'path: "stage:labels"}',
            'path: "stage:sft"}',
            r"all.yaml:15:27: `data.path` wants rows, and stage `sft` makes a model\n.*labels",
        ),
        (
            "    algorithm: {name: dpo}",
            '    model: {path: "stage:labels"}\n    algorithm: {name: dpo}',
            r"all.yaml:16:13: `model.path` wants a model, and stage `labels` makes rows\n.*sft",
        ),
        (
            "    algorithm: {name: dpo}",
            '    algorithm: {name: dpo}\n    reference: {path: "stage:labels"}',
            r"all.yaml:17:17: `reference.path` wants a model",
        ),
        ("    n: 2", "    n: 1", r"all.yaml:12:5: `n` .*greater than or equal to 2"),
        ("    n: 2", "    rounds: 2", r"all.yaml:12:5: unknown key `rounds`"),
        ("    n: 2", "    run: {steps: 2}", r"all.yaml:12:11: unknown key `run.steps`"),
    ],
)
def test_what_stands_in_the_wrong_place_is_said_with_its_place(plugins, old, new, message):
    assert old in ROWS
    with pytest.raises(ConfigError, match=message):
        stages(plugins, ROWS.replace(old, new))
