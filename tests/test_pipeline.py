"""Stages one after another: what is finished is kept, what was interrupted goes on, what changed is refused."""

from __future__ import annotations

import json
from shutil import rmtree

import pytest

from prefopt import pipeline
from prefopt.config.yaml import parse
from prefopt.errors import ConfigError, DataError
from prefopt.pipeline import checked, run_stages
from prefopt.session import Session
from prefopt.testing.tiny import tiny_rows, write_rows


@pytest.fixture
def document(tiny_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows("comparison"))
    text = f"""\
prefopt: 1
model: {{path: "{tiny_model}"}}
data: {{source: jsonl, path: "{rows}"}}
optim: {{lr: 0.01, batch_size: 8}}
run: {{dir: "{tmp_path / "all"}", steps: 2, device: cpu, threads: 1, checkpoint: {{every: 1}}}}
stages:
  - {{name: sft, algorithm: {{name: sft}}}}
  - {{name: reward, model: {{path: "stage:sft"}}, algorithm: {{name: reward_model}}}}
  - {{name: dpo, model: {{path: "stage:sft"}}, algorithm: {{name: dpo}}, run: {{steps: 3}}}}
"""
    return parse(text, "all.yaml")


def test_a_pipeline_goes_on_where_it_was_stopped_and_keeps_what_is_finished(document, plugins, tmp_path, monkeypatch):
    before = Session._notify

    def stop(self, hook, **arguments):
        before(self, hook, **arguments)
        if self.config.algorithm.name == "dpo" and arguments.get("step") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_notify", stop)
    lines = []
    with pytest.raises(KeyboardInterrupt):
        lines.extend(run_stages(checked(document, plugins), plugins))
    monkeypatch.undo()
    assert json.loads((tmp_path / "all/reward/result.json").read_text())["steps"] == 2
    assert not (tmp_path / "all/dpo/result.json").exists()
    lines = list(run_stages(checked(document, plugins), plugins))
    folder = tmp_path / "all"
    assert lines == [
        f"sft: finished before: {folder}/sft/model",
        f"reward: finished before: {folder}/reward/model",
        f"dpo: finished: {folder}/dpo/model",
    ]
    steps = [json.loads(line)["step"] for line in (folder / "dpo/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_stage_that_was_begun_is_not_run_with_other_settings(document, plugins, monkeypatch):
    list(run_stages(checked(document, plugins)[:1], plugins))
    document.data["stages"][0]["optim"] = {"lr": 0.5}
    with pytest.raises(ConfigError, match="stage `sft` was begun with another configuration"):
        checked(document, plugins)


def test_every_stage_is_checked_before_any_is_run(document, plugins, monkeypatch):
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("a stage was run"))
    document.data["stages"][2]["reference"] = {"path": "nowhere/at/all"}
    with pytest.raises(ConfigError, match="there is no folder `nowhere/at/all`"):
        list(run_stages(checked(document, plugins), plugins))


@pytest.fixture
def labelling(tiny_model, tmp_path):
    """A model, labels of its replies, and a method that learns from them."""
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows("demonstration"))
    text = f"""\
prefopt: 1
model: {{path: "{tiny_model}"}}
data: {{source: jsonl, path: "{rows}"}}
optim: {{lr: 0.01, batch_size: 8}}
sampler: {{name: plain, max_new_tokens: 4}}
run: {{dir: "{tmp_path / "all"}", steps: 1, device: cpu, threads: 1}}
stages:
  - {{name: labels, kind: label, n: 2, judge: {{name: rule, prefer: longer}}}}
  - name: dpo
    data: {{source: jsonl, path: "stage:labels"}}
    algorithm: {{name: dpo}}
"""
    return parse(text, "all.yaml")


def test_a_stage_learns_from_the_rows_of_another(labelling, plugins, tmp_path):
    folder, said = tmp_path / "all", []
    lines = list(run_stages(checked(labelling, plugins), plugins, say=said.append))
    count = len((folder / "labels/rows.jsonl").read_text().splitlines())
    assert f"labels: finished: {count} rows: {folder}/labels/rows.jsonl" in lines
    assert said[-1].startswith("labels: 24 of 24 rows in ")
    assert json.loads((folder / "dpo/run.json").read_text())["data"].keys() == {f"{folder}/labels/rows.jsonl"}
    assert list(run_stages(checked(labelling, plugins), plugins)) == [
        f"labels: finished before: {folder}/labels/rows.jsonl",
        f"dpo: finished before: {folder}/dpo/model",
    ]


@pytest.mark.parametrize(
    ("place", "section", "error", "message"),
    [
        (0, {"kind": "sample", "n": 1, "judge": None}, ConfigError, r"unknown key `judge`"),
        (0, {"model": None}, ConfigError, r"`model`: replies are drawn, and there is no model"),
        (0, {"model": {"path": "world:replies"}}, ConfigError, r"`world:replies` has learned nothing yet"),
        (
            0,
            {"model": {"path": "m", "embedding_noise": 5.0}},
            ConfigError,
            r"embedding_noise`: noise is for what is train",
        ),
        (0, {"constitution": "nowhere.yaml"}, ConfigError, r"nowhere.yaml: cannot read the file"),
        (0, {"n": None}, DataError, r"a demonstration cannot become a comparison"),
        (1, {"algorithm": {"name": "kto"}, "data": {"source": "jsonl", "path": "nowhere"}}, DataError, "nowhere"),
    ],
)
def test_what_is_wrong_with_rows_is_found_before_any_are_made(labelling, plugins, place, section, error, message):
    labelling.data["stages"][place] |= section
    with pytest.raises(error, match=message):
        checked(labelling, plugins)


def test_how_rows_are_worked_on_may_change_on_the_way(labelling, plugins):
    list(run_stages(checked(labelling, plugins)[:1], plugins))
    labelling.data["stages"][0] |= {"max_missing": 0.5, "batch": 3}
    assert checked(labelling, plugins)
    labelling.data["stages"][0]["n"] = 3
    with pytest.raises(ConfigError, match="stage `labels` was begun with another configuration"):
        checked(labelling, plugins)


def test_rows_that_are_gone_are_an_error_with_a_place(labelling, plugins, tmp_path):
    again = {"name": "again", "kind": "label", "judge": {"name": "rule", "prefer": "shorter"}, "model": None}
    again |= {"n": None, "data": {"source": "jsonl", "path": "stage:labels"}}
    labelling.data["stages"].insert(1, again)
    list(run_stages(checked(labelling, plugins)[:2], plugins))
    rmtree(tmp_path / "all/labels")
    with pytest.raises(ConfigError, match=r"labels/rows.jsonl: stage `again` was begun when this file was there"):
        checked(labelling, plugins)


@pytest.mark.parametrize("kept", ["file", "stage"])
def test_rankings_that_are_labelled_stay_rankings(labelling, plugins, tmp_path, kept):
    several = {"prompt": "p", "completions": ["a", "bb", "ccc"], "ranks": [0, 1, 2]}
    two = {"prompt": "q", "completions": ["d", "ee"], "ranks": [0, 1]}
    (tmp_path / "several.jsonl").write_text(json.dumps(several) + "\n" + json.dumps(two) + "\n")
    labels, model = labelling.data["stages"]
    labels |= {"n": None, "model": None, "data": {"source": "jsonl", "path": str(tmp_path / "several.jsonl")}}
    model |= {"algorithm": {"name": "reward_model_listwise"}}
    if kept == "stage":
        again = {"name": "again", "kind": "label", "judge": {"name": "rule", "prefer": "shorter"}, "model": None}
        labelling.data["stages"].insert(1, {**again, "data": {"source": "jsonl", "path": "stage:labels"}})
        model["data"] = {"source": "jsonl", "path": "stage:again"}
    list(run_stages(checked(labelling, plugins), plugins))
    rows = [json.loads(line) for line in (tmp_path / "all/labels/rows.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in rows] == [[0.0, 0.5, 1.0], [0.0, 1.0]]
    assert (tmp_path / "all/dpo/model/config.json").exists()


def test_rows_that_a_method_cannot_learn_from_are_refused_before_they_are_made(labelling, plugins):
    stage = {"kind": "sample", "n": 1, "name": "labels"}
    labelling.data["stages"][0] = stage
    with pytest.raises(DataError, match="a demonstration cannot become a comparison"):
        checked(labelling, plugins)
