"""The configurations of benchmarks/ on real pairs with a real model, for a few steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from prefopt.bench.plan import make_plan
from prefopt.config import load_run
from prefopt.config.load import validated
from prefopt.config.models import SuiteConfig
from prefopt.config.yaml import parse
from prefopt.plugins import Plugins, load
from prefopt.session import train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def quiet(shared, monkeypatch) -> Plugins:
    if not (shared / "models/TinyStories-656K").is_dir():
        pytest.skip(f"no real model at {shared}/models; set PREFOPT_DATA")
    monkeypatch.setenv("PREFOPT_DATA", str(shared))
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    return plugins


def test_a_reward_model_learns_the_pairs_it_sees_again_and_again(quiet, tmp_path):
    """Its loss starts at log 2, for its head starts at 0, and falls to less than a tenth of that on eight pairs."""
    few = ["data.stop=8", "optim.batch_size=8", "run.steps=25", "run.epochs=null", "eval=null"]
    result = train(
        load_run(BENCHMARKS / "real/reward_model.yaml", quiet.find, [f"run.dir={tmp_path}/run", *few]), quiet
    )
    lines = (result.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    first, last = (json.loads(lines[i])["loss/total"] for i in (0, -1))
    assert first == pytest.approx(math.log(2), abs=0.05)
    assert last < 0.07


@pytest.mark.parametrize("name", ["hh", "hh-anchored", "hh-normalised", "persona"])
def test_the_suites_of_real_pairs_plan_each_method_for_each_seed(quiet, tmp_path, name):
    document = parse((BENCHMARKS / f"suites/{name}.yaml").read_text("utf-8"), f"{name}.yaml")
    suite = validated(SuiteConfig, document, quiet.find)
    cells = make_plan(suite, document, tmp_path, quiet.find).cells
    assert len(cells) == len(suite.seeds) * len(suite.methods)
