"""The main job, as a newcomer runs it, and what its table must show."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefopt.bench.report import Report

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_in_five_minutes_each_method_is_above_sft_beyond_doubt(tmp_path):
    suite = str(ROOT / "benchmarks/suites/quickstart.yaml")
    command = [str(Path(sys.executable).parent / "prefopt"), "bench", "run", suite, "--out", str(tmp_path / "out")]
    began = time.perf_counter()
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    seconds = time.perf_counter() - began
    assert run.returncode == 0, run.stderr
    print(f"{run.stdout}\nmain job: {seconds:.0f} s")
    report = Report.model_validate_json((tmp_path / "out/report.json").read_text("utf-8"))
    gold = {line.label: line.metrics["gold_reward"] for line in report.summary}
    assert {line.n for line in report.summary} == {3}
    assert len(gold) == 12
    for label in gold.keys() - {"SFT"}:
        assert gold[label].low > gold["SFT"].high, label
    assert seconds < 300
