"""A run killed after step 7 of 12 and resumed leaves the same bytes as one that was never disturbed."""

from __future__ import annotations

import json
import os
import signal
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefopt.plugins import load
from prefopt.session import train
from prefopt.testing.tiny import tiny_config

MIX = {"source": "replies", "size": 20, "weight": 0.5, "batch_size": 3, "max_length": 40, "overflow": "truncate"}
REPETITION = {"name": "repetition", "n": 1, "unit": "characters"}
PPO = {
    "algorithm": {
        "name": "ppo",
        "inner_epochs": 2,
        "minibatches": 2,
        "kl_target": 0.5,
        "kl_horizon": 100,
        "normalise": "standardise",
        "truncated": "end",
    },
    "reward": REPETITION,
    "sampler": {"name": "plain", "max_new_tokens": 9},
}
RUNS = {
    "sft": {"algorithm": {"name": "sft"}, "eval": {"every": 3, "samples": 2, "rows": 4}},
    "reward_model": {"algorithm": {"name": "reward_model", "margin": True}, "eval": {"every": 3, "rows": 4}},
    "dpo": {"algorithm": {"name": "dpo"}, "eval": {"every": 3, "samples": 2, "rows": 4}},
    "dpo, mixed": {"algorithm": {"name": "dpo"}, "data": {"mix": MIX}},
    "dpo, mixed, with noise": {"algorithm": {"name": "dpo"}, "data": {"mix": MIX}, "model": {"embedding_noise": 5.0}},
    "dpo, moving reference": {"algorithm": {"name": "dpo"}, "reference": {"every": 2, "mix": 0.5}},
    "dpo, best kept": {
        "algorithm": {"name": "dpo"},
        "eval": {"every": 2, "rows": 4, "keep_best": True, "metric": "reward/margin", "goal": "min"},
    },
    "ppo": {**PPO, "eval": {"every": 3, "samples": 2, "rows": 4}},
    "ppo, critic, mixed": {**PPO, "critic": {"lr": 3e-3}, "data": {"mix": MIX}},
    "grpo": {
        "algorithm": {"name": "grpo", "n": 4, "beta": 0.1, "inner_epochs": 2},
        "reward": REPETITION,
        "sampler": {"name": "continuous", "max_new_tokens": 9},
    },
}


class Killer:
    """An observer that kills its process when a step is finished, as a lost machine would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, run, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(model: Path, folder: Path, sections: dict, resume: bool = False, kill_at: int | None = None) -> None:
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    if kill_at is not None:
        object.__setattr__(plugins, "notify", _killing(plugins.notify, Killer(kill_at)))
    settings = {"steps": 12, "checkpoint": {"every": 5}}
    if "critic" in sections:
        sections = {**sections, "critic": {"path": str(model), **sections["critic"]}}
    config = tiny_config(model, folder, {**sections, "run": settings}, plugins)
    train(config, plugins, resume=resume)


def _killing(notify, killer):
    def wrapped(hook, on_error, **arguments):
        notify(hook, on_error, **arguments)
        if hook == "prefopt_step_finished" and not any(k.startswith("eval/") for k in arguments["metrics"]):
            killer(**arguments)

    return wrapped


def killed(model: Path, folder: Path, sections: dict, step: int, resume: bool = False) -> None:
    """Runs in a child process that dies after `step`."""
    child = os.fork()
    if child == 0:
        try:
            run(model, folder, sections, resume=resume, kill_at=step)
        finally:
            os._exit(1)  # not reached when the kill works
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run ended before it was killed"
    assert os.WTERMSIG(status) == signal.SIGKILL


def fingerprints(folder: Path) -> dict[str, str]:
    """Every byte that must not differ: model, critic, metrics, samples, what was drawn, result, and the last checkpoint
    with its optimizer."""
    last = max(folder.glob("checkpoints/step-*"))
    files = [*folder.glob("model/*"), *last.iterdir(), folder / "metrics.jsonl", folder / "result.json"]
    files += [*folder.glob("critic/*"), *folder.glob("samples.jsonl"), *folder.glob("rollouts.parquet")]
    cards = ("README.md", "config.json")  # they name the run's own folder
    named = {str(p.relative_to(folder)): p for p in files if p.name not in cards}
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in named.items()}


@pytest.mark.parametrize("name", RUNS)
def test_killed_after_step_7_of_12(tiny_model, tmp_path, name):
    run(tiny_model, tmp_path / "whole", RUNS[name])
    killed(tiny_model, tmp_path / "killed", RUNS[name], step=7)
    run(tiny_model, tmp_path / "killed", RUNS[name], resume=True)
    whole, again = fingerprints(tmp_path / "whole"), fingerprints(tmp_path / "killed")
    assert again == whole
    assert {"metrics.jsonl", "checkpoints/step-00000012/optimizer.safetensors"} <= whole.keys()
    assert ("rollouts.parquet" in whole) == ("reward" in RUNS[name])
    assert ("critic/model.safetensors" in whole) == ("critic" in RUNS[name])


def test_what_ppo_adapts_between_steps_is_in_the_checkpoint(tiny_model, tmp_path):
    """Guards the test above: after five steps of 8 scores it has moved, and the sixth begins with it."""
    killed(tiny_model, tmp_path / "killed", PPO, step=7)
    kept = load_file(tmp_path / "killed/checkpoints/step-00000005/algorithm.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert kept["ppo/moments"][0] == 5 * 8
    assert kept["ppo/moments"][1].item() == pytest.approx(sum(m["reward/mean"] for m in lines[:5]) / 5)
    assert kept["ppo/beta"].item() == lines[5]["kl/weight"]
    assert abs(kept["ppo/beta"].item() / 0.05 - 1) > 0.01


def test_killed_twice_and_before_the_first_checkpoint(tiny_model, tmp_path):
    """Steps 4 and 8 lie in the second and third epoch of 24 rows in steps of 8."""
    sections = RUNS["dpo"] | {"eval": None}
    run(tiny_model, tmp_path / "whole", sections)
    killed(tiny_model, tmp_path / "killed", sections, step=2)
    killed(tiny_model, tmp_path / "killed", sections, step=8, resume=True)
    run(tiny_model, tmp_path / "killed", sections, resume=True)
    assert fingerprints(tmp_path / "killed") == fingerprints(tmp_path / "whole")


def test_a_damaged_checkpoint_falls_back_and_still_ends_in_the_same_bytes(tiny_model, tmp_path):
    sections = RUNS["dpo"] | {"eval": None}
    run(tiny_model, tmp_path / "whole", sections)
    killed(tiny_model, tmp_path / "killed", sections, step=11)
    weights = tmp_path / "killed/checkpoints/step-00000010/model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    run(tiny_model, tmp_path / "killed", sections, resume=True)
    assert fingerprints(tmp_path / "killed") == fingerprints(tmp_path / "whole")


def test_the_same_seed_twice_gives_the_same_bytes_and_another_seed_does_not(tiny_model, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        plugins = load()
        plugins.manager.unregister(name="prefopt:progress")
        sections = {"algorithm": {"name": "dpo"}, "run": {"steps": 4, "seed": seed}}
        train(tiny_config(tiny_model, tmp_path / name, sections, plugins), plugins)
    a, b, c = (fingerprints(tmp_path / name) for name in "abc")
    assert a == b
    assert a["metrics.jsonl"] != c["metrics.jsonl"]


def test_training_moved_the_weights(tiny_model, tmp_path):
    """Guards the tests above: a run that changes nothing is easily repeated."""
    run(tiny_model, tmp_path / "whole", RUNS["dpo"] | {"eval": None})
    before, after = (load_file(p / "model.safetensors") for p in (tiny_model, tmp_path / "whole/model"))
    assert any((before[name] - after[name]).abs().max() > 1e-3 for name in before)
    losses = [json.loads(line)["loss/total"] for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
