"""Noise on embeddings has the size its paper gives it, is there when a model is trained and never else, and depends on
nothing but seed, step and place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.api import Algorithm, Batch, Comparison, Loss, Needs, Policy
from prefopt.data.assemble import Assembled
from prefopt.data.render import Tokens
from prefopt.engine.backward import backward
from prefopt.engine.columns import Forwarder
from prefopt.engine.forward import Scorer
from prefopt.engine.layout import PLAIN, Paths
from prefopt.engine.noise import Noise
from prefopt.engine.ranks import Ranks
from prefopt.engine.recompute import prepare
from prefopt.errors import ConfigError
from prefopt.plugins import load
from prefopt.preflight import check
from prefopt.rows import Role
from prefopt.testing.tiny import tiny_config, train_on

ALPHA, STILL = 5.0, {"lr": 1e-12, "batch_size": 24}
"""A rate at which the model stays as it is, and all rows in each step: steps differ in their noise alone."""


def noise(places: range, lengths: list[int], width: int, wide: int, key: int = 3) -> torch.Tensor:
    return Noise(ALPHA, key).added(places, lengths, torch.zeros(len(lengths), wide, width))


def test_its_size_is_that_of_the_paper():
    """Uniform in [-1, 1], of mean square 1/3, times alpha / sqrt(L d)."""
    for length, width in ((1, 64), (20, 16), (50, 8)):
        found = noise(range(200), [length] * 200, width, length)
        most = ALPHA / math.sqrt(length * width)
        assert 0.99 * most < float(found.abs().max()) <= most * (1 + 1e-6)
        assert float(found.square().mean()) == pytest.approx(ALPHA**2 / (3 * length * width), rel=0.03)
        assert float(found.mean()) == pytest.approx(0, abs=0.03 * most)


def test_padding_has_none_and_changes_none():
    lengths = [7, 12, 1]
    narrow, wide = noise(range(3), lengths, 8, 12), noise(range(3), lengths, 8, 40)
    assert torch.equal(narrow, wide[:, :12])
    for row, length in zip(wide, lengths, strict=True):
        assert float(row[length:].abs().max()) == 0
        assert float(row[:length].abs().min()) > 0


def test_a_place_has_its_own_whatever_stands_beside_it():
    both, alone = noise(range(2), [5, 5], 8, 5), noise(range(1, 2), [5], 8, 5)
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, noise(range(2), [5, 5], 8, 5, key=4))


class Apart(Algorithm):
    """A loss of each token."""

    name, eats = "apart", Comparison

    def needs(self) -> Needs:
        return Needs(during=frozenset({"logps"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        return Loss(-batch.mean(policy.logps, "tokens"), {})


class Sorted(Apart):
    """A loss of the minibatch as a whole."""

    name = "sorted"
    coupled: ClassVar[bool] = True

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        chosen, rejected = batch.pairs(batch.sum_tokens(policy.logps))
        gap = chosen.sort().values - rejected.sort().values
        return Loss(batch.mean(torch.nn.functional.softplus(-gap), "pairs"), {})


def step() -> Assembled:
    """Three pairs of different lengths that begin alike, the chosen ones first."""
    sizes = {Role.CHOSEN: (3, 1, 6), Role.REJECTED: (5, 2, 1)}
    placed = [(role, g, size) for role, own in sizes.items() for g, size in enumerate(own)]
    tokens = [Tokens((5 + g, 9, 7), tuple(range(10 + role, 10 + role + size))) for role, g, size in placed]
    roles, groups, _ = zip(*placed, strict=True)
    return Assembled(Batch.build([t.completion for t in tokens], list(roles), list(groups)), tokens)


def gradients(
    tiny_model: Path, algorithm: Algorithm, budget: int, paths: Paths = PLAIN, again: bool = False, noisy: bool = True
) -> list[torch.Tensor]:
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), paths=paths)
    scorer.recomputed = prepare(scorer.network) if again else []
    forwarder = Forwarder(scorer, Ranks("cpu"), budget, "float32", noise=Noise(ALPHA, 1) if noisy else None)
    metrics = backward(algorithm, forwarder, step())
    return [torch.tensor(metrics["loss/total"]), *(p.grad for p in scorer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("algorithm", [Apart(), Sorted()], ids=["apart", "coupled"])
def test_any_cut_and_any_path_give_the_same_gradient(tiny_model, algorithm):
    expected = gradients(tiny_model, algorithm, 10_000)
    shared, tiled = Paths("shared"), Paths("shared", tiled=True)
    for budget, paths, again in ((20, PLAIN, False), (10_000, shared, False), (20, tiled, False), (20, tiled, True)):
        found = gradients(tiny_model, algorithm, budget, paths, again)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    without = gradients(tiny_model, algorithm, 10_000, noisy=False)
    assert max(float((a - b).abs().max()) for a, b in zip(without, expected, strict=True)) > 1e-3


def measured(tiny_model: Path, folder: Path, algorithm: str, model: dict, **sections) -> tuple[list[dict], list[dict]]:
    """Metrics of two steps, and of the evaluations after them, of a model that stays as it is."""
    sections = {"optim": STILL, "run": {"steps": 2}, "eval": {"every": 1, "rows": 4}, **sections}
    train_on(tiny_model, folder, {"algorithm": {"name": algorithm}, "model": model, **sections})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return tuple([x for x in lines if ("eval/loss/total" in x) == evaluated] for evaluated in (False, True))


@pytest.mark.parametrize(
    ("algorithm", "model", "more"),
    [
        ("dpo", {"lora": {"rank": 4}}, {}),
        ("tdpo2", {}, {"optim": {**STILL, "precision": "bfloat16"}}),
        ("reward_model", {}, {}),
    ],
    ids=["adapters", "bfloat16", "reward_model"],
)
def test_losses_have_it_and_evaluations_do_not(tiny_model, tmp_path, algorithm, model, more):
    plain, evaluated = measured(tiny_model, tmp_path / "plain", algorithm, model, **more)
    steps, found = measured(tiny_model, tmp_path / "noisy", algorithm, {**model, "embedding_noise": ALPHA}, **more)
    for one, other in zip(found, evaluated, strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    for one, other in zip(steps, plain, strict=True):
        assert abs(one["loss/total"] - other["loss/total"]) > 1e-4


def test_dpo_without_it_begins_at_log_2_and_with_it_elsewhere(tiny_model, tmp_path):
    """The reference has none: only then do the two differ before the first update."""
    live = {"reference": {"mode": "resident"}}
    plain, _ = measured(tiny_model, tmp_path / "plain", "dpo", {}, **live)
    noisy, evaluated = measured(tiny_model, tmp_path / "noisy", "dpo", {"embedding_noise": ALPHA}, **live)
    assert plain[0]["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluated[0]["eval/loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(noisy[0]["loss/total"] - math.log(2)) > 1e-3


def test_every_step_and_every_seed_has_its_own(tiny_model, tmp_path):
    model, all_rows = {"embedding_noise": ALPHA}, {"eval": None}
    (first, second), _ = measured(tiny_model, tmp_path / "0", "sft", model, **all_rows)
    (other, _), _ = measured(tiny_model, tmp_path / "1", "sft", model, run={"steps": 2, "seed": 1}, **all_rows)
    plain, _ = measured(tiny_model, tmp_path / "plain", "sft", {}, **all_rows)
    assert plain[0]["loss/total"] == pytest.approx(plain[1]["loss/total"], abs=1e-6)
    assert abs(first["loss/total"] - second["loss/total"]) > 1e-4
    assert abs(first["loss/total"] - other["loss/total"]) > 1e-4


def test_a_run_that_samples_refuses_it(tiny_model, tmp_path):
    plugins = load()
    reward = {"name": "repetition", "n": 1, "unit": "characters"}
    sections = {"algorithm": {"name": "grpo"}, "reward": reward, "model": {"embedding_noise": ALPHA}}
    with pytest.raises(ConfigError, match="with noise in training passes") as caught:
        check(tiny_config(tiny_model, tmp_path / "run", sections, plugins), plugins.registry)
    assert caught.value.problems[0].where == "model.embedding_noise"
