"""Two processes over gloo give the numbers of one."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefopt.config import dump, resolved
from prefopt.session import train
from prefopt.testing.tiny import tiny_config

MIX = {"source": "replies", "size": 20, "weight": 0.5, "batch_size": 3, "max_length": 40, "overflow": "truncate"}
RUNS = {
    "sft": {"algorithm": {"name": "sft"}, "eval": {"every": 3, "rows": 4, "samples": 2}},
    "reward_model": {"algorithm": {"name": "reward_model", "centre": 0.01}},
    "dpo": {"algorithm": {"name": "dpo"}, "eval": {"every": 3, "rows": 4}},
    "dpo-resident": {"algorithm": {"name": "dpo"}, "reference": {"mode": "resident"}},
    "dpo-odd": {
        "algorithm": {"name": "dpo"},
        "optim": {"batch_size": 5, "token_budget": 60, "lr": 1e-3},
    },  # ranks with idle turns
    "coupled": {"algorithm": {"name": "sorted"}, "optim": {"batch_size": 6, "token_budget": 60, "lr": 1e-3}},
    "mixed": {"algorithm": {"name": "dpo"}, "data": {"mix": MIX}},
    "noise": {
        "algorithm": {"name": "dpo"},
        "data": {"mix": MIX},
        "optim": {"batch_size": 5, "token_budget": 60, "lr": 1e-3},
        "model": {"embedding_noise": 5.0},
    },
    "ppo": {
        "algorithm": {"name": "ppo", "minibatches": 2},
        "reward": {"name": "repetition", "n": 1, "unit": "characters"},
        "sampler": {"name": "plain", "max_new_tokens": 9},
        "eval": {"every": 3, "rows": 4, "samples": 3},
    },
    "online-dpo": {
        "algorithm": {"name": "dpo"},
        "rollout": {"n": 3},
        "reward": {"name": "repetition", "n": 1, "unit": "characters"},
        "sampler": {"name": "plain", "max_new_tokens": 9},
    },
    "plain": {"algorithm": {"name": "dpo"}, "optim": {"lr": 1e-3, "forward": "plain"}},
}
SCRIPT = Path(__file__).parent / "train_all.py"
quiet_plugins = runpy.run_path(str(SCRIPT))["quiet_plugins"]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """Every run once alone and once on two ranks, in `one/NAME` and `two/NAME`."""
    root = tmp_path_factory.mktemp("ranks")
    plugins = quiet_plugins()
    files = []
    for name, sections in RUNS.items():
        settings = {"steps": 7, "checkpoint": {"every": 4}}
        sections = {"optim": {"lr": 1e-3}, **sections}  # AdamW turns rounding of tiny gradients into steps of size lr
        train(tiny_config(tiny_model, root / "one" / name, {**sections, "run": settings}, plugins), plugins)
        config = tiny_config(tiny_model, root / "two" / name, {**sections, "run": settings}, plugins)
        path = root / f"{name}.yaml"
        path.write_text(dump(resolved(config)))
        files.append(str(path))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    unobserved = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}
    environment = {**unobserved, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "--standalone", str(SCRIPT), *files], check=True, env=environment, timeout=300)
    return root


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_metrics_agree(trained, name):
    one, two = trained / "one" / name, trained / "two" / name
    alone, together = (load_file(folder / "model/model.safetensors") for folder in (one, two))
    assert alone.keys() == together.keys()
    for key, x in alone.items():
        assert (x - together[key]).abs().max() <= 1e-5, key
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(lines[0]) == len(lines[1]) >= 7
    for a, b in zip(*lines, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_counted_does_not_depend_on_ranks(trained, name):
    one, two = (json.loads((trained / kind / name / "result.json").read_text()) for kind in ("one", "two"))
    assert one == two
