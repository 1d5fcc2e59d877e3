"""A small suite, run for real in worker processes, then run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from shutil import copytree

import pytest

from prefopt.bench.plan import Plan, make_plan
from prefopt.bench.report import Report, commit_of
from prefopt.bench.suite import Execution, Task, run_suite
from prefopt.config.load import validated
from prefopt.config.models import SuiteConfig
from prefopt.config.yaml import apply_overrides, parse
from prefopt.errors import ConfigError, ResourceError

SUITE = """\
prefopt: 1
name: small
seeds: [0, 1, 2]
baseline: sft
stages:
  sft:
    model: {path: "world:replies"}
    data: {source: replies, size: 60}
    algorithm: {name: sft}
    optim: {lr: 1e-2, batch_size: 20}
    run: {threads: 1, device: cpu}
base:
  model: {path: "stage:sft"}
  data: {source: replies, format: comparisons, size: 20}
  algorithm: {name: dpo}
  optim: {lr: 1e-3, batch_size: 10}
  run: {threads: 1, device: cpu}
methods:
  - {label: SFT, stage: sft}
  - {label: "DPO <b>", reference: {mode: resident}}
  - {label: RM, algorithm: {name: reward_model}, best_of: 3}
tasks:
  - {name: gold_reward, reward: {name: replies_gold}, samples: 2}
  - {name: win_rate, reward: {name: replies_gold}}
  - {name: kl}
  - {name: length}
  - {name: reward_quality}
sampler: {name: plain, max_new_tokens: 12}
prompts: 5
held_out: {source: replies, format: comparisons, size: 12, split: held_out}
workers: 2
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, list[str]]:
    """A suite that has run, in a folder whose name happens to be a secret."""
    root = tmp_path_factory.mktemp("secret-suite")
    (root / "suite.yaml").write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADE_UP_TOKEN", root.name)
        return root, list(run_suite(root / "suite.yaml", out=root / "out"))


@pytest.fixture
def report(ran) -> Report:
    return Report.model_validate_json((ran[0] / "out/report.json").read_text("utf-8"))


def test_every_cell_is_measured_with_its_budget(report):
    assert [(c.label, c.seed) for c in report.cells] == [
        (label, seed) for seed in (0, 1, 2) for label in ("SFT", "DPO <b>", "RM")
    ]
    for cell in report.cells:
        assert {"gold_reward", "win_rate", "kl_sequence", "length"} <= cell.metrics.keys()
        assert 0 <= cell.metrics["gold_reward"] <= 4
        assert len(cell.samples) == 5
        assert cell.versions["prefopt-dpo" if cell.algorithm == "dpo" else "prefopt"]
    sft, dpo, rm = report.cells[:3]
    assert (sft.budget.tokens_backward, sft.budget.seconds, sft.metrics["kl_sequence"]) == (0, 0, 0)
    assert dpo.budget.tokens_backward == dpo.budget.tokens_forward == rm.budget.tokens_backward > 0
    assert dpo.budget.tokens_sampled == 0
    assert 0 < rm.budget.tokens_sampled <= 5 * 2 * (3 - 1) * 12  # two replies of each of three are not given
    assert rm.budget.peak_memory_bytes > 1e8
    assert rm.metrics["kl_sequence"] == pytest.approx(1.0986 - 2 / 3, abs=1e-3)
    assert "reward_accuracy" in rm.metrics
    assert "reward_accuracy" not in dpo.metrics


def test_the_summary_is_over_seeds_with_intervals(report):
    assert [(s.algorithm, s.label, s.n) for s in report.summary] == [
        ("sft", "SFT", 3),
        ("dpo", "DPO <b>", 3),
        ("reward_model", "RM", 3),
    ]
    interval = report.summary[1].metrics["length"]
    values = [c.metrics["length"] for c in report.cells if c.label == "DPO <b>"]
    assert interval.mean == pytest.approx(sum(values) / 3)
    assert interval.low < interval.mean < interval.high


def test_the_lines_end_with_the_table_and_the_report_s_path(ran):
    root, lines = ran
    assert lines[-1].startswith(f"report: {root}/out/report.html")
    table = lines[lines.index("") :]
    assert table[1].split()[:3] == ["method", "gold", "reward"]
    assert any(line.startswith("DPO <b>  ") and "[" in line for line in table)
    assert any("mean over 3 seeds [95 % interval, Student t]" in line for line in table)


def test_running_again_does_no_work_and_writes_the_same(ran, report):
    root, _ = ran
    before = {p: p.stat().st_mtime_ns for p in (root / "out/store").rglob("*") if p.is_file()}
    lines = list(run_suite(root / "suite.yaml", out=root / "out"))
    assert lines[0] == "18 of 18 runs and measurements are kept from before"
    assert {p: p.stat().st_mtime_ns for p in before} == before
    again = Report.model_validate_json((root / "out/report.json").read_text("utf-8"))
    assert again.comparable() == report.comparable()


@pytest.mark.slow
def test_another_folder_gives_the_same_numbers_byte_for_byte(ran, report, tmp_path):
    root, _ = ran
    list(run_suite(root / "suite.yaml", ["seeds=[1]", "workers=1"], tmp_path / "again"))
    other = Report.model_validate_json((tmp_path / "again/report.json").read_text("utf-8"))
    assert other.comparable()["cells"] == [c for c in report.comparable()["cells"] if c["seed"] == 1]
    assert "single run" in (tmp_path / "again/report.html").read_text("utf-8")


def test_a_wrong_suite_runs_nothing(ran, tmp_path):
    root, _ = ran
    with pytest.raises(ConfigError, match="needs"):
        list(run_suite(root / "suite.yaml", ["base.algorithm={name: reward_model}"], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cell_that_fails_is_reported_and_the_others_are_kept(ran, tmp_path):
    root, _ = ran
    copytree(root / "out", tmp_path / "out")  # all but that cell is done
    overrides = ["seeds=[0]", "methods.1.data.max_length=3", "workers=1"]
    lines = []
    with pytest.raises(ResourceError, match="train DPO <b>, seed 0: row 0, .* more than data.max_length = 3"):
        lines.extend(run_suite(root / "suite.yaml", overrides, tmp_path / "out"))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [c["label"] for c in report["cells"]] == ["SFT", "RM"]
    assert [f["title"] for f in report["failures"]] == ["train DPO <b>, seed 0"] * (len(report["failures"]) - 1) + [
        "measure DPO <b>, seed 0"
    ]
    assert "needs `train DPO &lt;b&gt;, seed 0`, which failed" in (tmp_path / "out/report.html").read_text()


def test_no_secret_is_in_the_file_of_a_cell(tmp_path, plugins):
    secret = "hf_" + "abcdefgh" * 3
    suite = validated(SuiteConfig, parse(SUITE, "suite.yaml"), plugins.find)
    execution = Execution(suite, Plan(), tmp_path, None, plugins.find)
    (tmp_path / "cells").mkdir()
    future: Future[str] = Future()
    future.set_result(json.dumps({"metrics": {}, "samples": [{"prompt": "p", "reply": secret}]}))
    assert execution._settle("key", Task("measure it", {"measure": {}}, ()), future)
    kept = json.loads((tmp_path / "cells/key.json").read_text())
    assert kept["samples"] == [{"prompt": "p", "reply": "[redacted]"}]
    assert kept["commit"] == commit_of()


class Pool:
    """A pool of processes whose answers are given; it breaks at the first answer that is None."""

    def __init__(self, answers: Callable[[dict], dict | None]) -> None:
        self.answers, self.broken = answers, False

    def __call__(self, *arguments):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, work, text: str) -> Future[str]:
        if self.broken:
            raise BrokenProcessPool
        future: Future[str] = Future()
        answer = self.answers(json.loads(text))
        if answer is None:
            self.broken = True
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(json.dumps(answer))
        return future


def executed(tmp_path, plugins, monkeypatch, answers) -> Execution:
    """The suite with one seed, worked off by a pool with these answers."""
    monkeypatch.setattr("prefopt.bench.suite.ProcessPoolExecutor", Pool(answers))
    document = apply_overrides(parse(SUITE, "suite.yaml"), ["seeds=[0]"])
    suite = validated(SuiteConfig, document, plugins.find)
    plan = make_plan(suite, document, tmp_path, plugins.find)
    execution = Execution(suite, plan, tmp_path, None, plugins.find)
    (tmp_path / "cells").mkdir()
    tasks = execution._tasks()
    list(execution._work(tasks, dict(tasks)))
    return execution


def test_an_unforeseen_failure_is_listed_and_the_rest_is_worked_off(tmp_path, plugins, monkeypatch):
    done = []

    def answers(request):
        if request.get("stage", {}).get("algorithm", {}).get("name") == "dpo":
            return {"error": ["ZeroDivisionError: x"], "traceback": "File ..., line 1"}
        done.append(next(iter(request)))
        return {"metrics": {}, "samples": []}

    execution = executed(tmp_path, plugins, monkeypatch, answers)
    assert done == ["stage", "stage", "measure", "measure"] or done == ["stage", "measure", "stage", "measure"]
    assert [(f.title, f.problem, f.traceback) for f in execution.failures] == [
        ("train DPO <b>, seed 0", "ZeroDivisionError: x", "File ..., line 1"),
        ("measure DPO <b>, seed 0", "needs `train DPO <b>, seed 0`, which failed", ""),
    ]


def test_a_dead_process_is_a_failure_and_nothing_more_begins(tmp_path, plugins, monkeypatch):
    execution = executed(
        tmp_path, plugins, monkeypatch, lambda request: None if request["stage"]["algorithm"]["name"] == "dpo" else {}
    )
    assert [f.problem for f in execution.failures] == [
        "a worker process died, this one or one beside it. Out of memory? Run again.",
        "not begun: a worker process died before",
        "not begun: a worker process died before",
        "needs `train DPO <b>, seed 0`, which failed",
        "needs `train RM, seed 0`, which failed",
    ]


def test_measurements_run_on_the_device_of_the_base_run(tmp_path, plugins, monkeypatch):
    asked = []

    def answers(request):
        asked.append(request["measure"]["device"] if "measure" in request else request["stage"]["run"]["device"])
        return {"metrics": {}, "samples": []}

    executed(tmp_path, plugins, monkeypatch, answers)
    assert asked == ["cpu"] * 6
