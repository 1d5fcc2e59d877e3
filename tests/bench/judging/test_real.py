"""Recorded verdicts of real judges: the published figures are what a recount of the files says."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from prefopt.bench.judging.evaluate import evaluate
from prefopt.cli.judge import read

ROOT = Path(__file__).parents[3] / "benchmarks"
PUBLISHED = json.loads((ROOT / "results/judges.json").read_text("utf-8"))


def report(name, shared, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_DATA", str(shared))
    config = read(ROOT / f"judges/{name}.yaml", [f"out={tmp_path}/out"])
    return {judge.label: judge for judge in evaluate(config, lambda line: None).judges}


@pytest.mark.parametrize("name", ["llmbar", "llmbar-neighbor", "pandalm"])
def test_published_figures_are_found_again(name, shared, tmp_path, monkeypatch):
    found = report(name, shared, tmp_path, monkeypatch)
    for label, judge in PUBLISHED[name]["judges"].items():
        metrics = {key: x.model_dump(exclude_none=True) for key, x in found[label].metrics.items()}
        assert metrics == {key: pytest.approx(x) for key, x in judge["metrics"].items()}


def test_gpt_4_on_llmbar_is_counted_by_hand(shared):
    folder = shared / "data/llmbar/Dataset/LLMBar/Natural/evaluators/GPT-4"
    for file, label in (("Swap", "gpt-4"), ("Swap_CoT", "gpt-4, reasoning first")):
        rows = json.loads((folder / file / "result.json").read_text("utf-8"))
        said = [[row["results"][0][f"swap = {swap}"]["winner"] for swap in (False, True)] for row in rows]
        right = [fmean(winner == str(row["label"]) for winner in both) for row, both in zip(rows, said, strict=True)]
        metrics = PUBLISHED["llmbar"]["judges"][label]["metrics"]
        assert metrics["accuracy"]["mean"] == pytest.approx(fmean(right))
        assert metrics["order_consistency"]["mean"] == pytest.approx(fmean(a == b for a, b in said))
        first = [(one == "1") + (other == "2") for one, other in said]
        assert metrics["position_bias"]["mean"] == pytest.approx(fmean(first) / 2 - 0.5)


def test_planted_biases_are_found_in_real_pairs():
    judges = PUBLISHED["llmbar"]["judges"]
    bias = judges["longer, 0.2 by place"]["metrics"]["position_bias"]
    assert bias["low"] <= 0.1 <= bias["high"]
    assert judges["longer"]["metrics"]["length_bias"]["low"] > 0.3
    for name in ("stories260K", "TinyStories-656K"):
        metrics = PUBLISHED["stories"]["judges"][name]["metrics"]
        assert metrics["position_bias"]["low"] > 0.1
        assert metrics["order_consistency"]["mean"] == 0.0
