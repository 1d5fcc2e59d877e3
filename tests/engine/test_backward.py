"""Gradients do not depend on how a minibatch is cut, for plain losses and for losses that couple it whole."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.api import Algorithm, Batch, Comparison, Loss, Needs, Policy
from prefopt.data.assemble import Assembled
from prefopt.data.render import Tokens
from prefopt.engine.backward import backward
from prefopt.engine.columns import Forwarder, fill
from prefopt.engine.forward import Scorer
from prefopt.engine.layout import PLAIN, Paths
from prefopt.engine.ranks import Ranks
from prefopt.errors import PluginError
from prefopt.rows import Role

KEPT = [(False, 0), (True, 0), (True, 1 << 20)]


class TokenMean(Algorithm):
    """A mean over tokens, to which long completions contribute more."""

    name, eats = "token_mean", Comparison

    def needs(self) -> Needs:
        return Needs(during=frozenset({"logps", "entropy"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        value = -batch.mean(policy.logps, "tokens") + 0.1 * batch.mean(policy.entropy, "chosen_tokens")
        return Loss(value, {"logp": batch.mean(policy.logps, "tokens").detach()})


class Sorted(Algorithm):
    """Compares the k-th best chosen with the k-th best rejected completion of the whole minibatch (as AOT does)."""

    name, eats = "sorted", Comparison
    coupled: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs(during=frozenset({"logps", "values"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        chosen, rejected = batch.pairs(batch.sum_tokens(policy.logps + policy.values))
        gap = chosen.sort().values - rejected.sort().values
        return Loss(batch.mean(torch.nn.functional.softplus(-gap), "pairs"), {"gap": batch.mean(gap.detach(), "pairs")})


def step() -> Assembled:
    """Four pairs of different lengths."""
    sizes = [(3, 5), (1, 2), (6, 1), (2, 2)]
    tokens, role, group = [], [], []
    for g, pair in enumerate(sizes):
        for r, size in zip((Role.CHOSEN, Role.REJECTED), pair, strict=True):
            tokens.append(Tokens((5 + g, 9), tuple(range(10 + r, 10 + r + size))))
            role.append(r)
            group.append(g)
    return Assembled(Batch.build([t.completion for t in tokens], role, group), tokens)


def gradients(
    tiny_model, algorithm: Algorithm, budget: int, values: bool = False, paths: Paths = PLAIN, in_place: bool = False
) -> tuple[dict, list[torch.Tensor]]:
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), values=values, paths=paths)
    if scorer.value_head is not None:
        torch.nn.init.constant_(scorer.value_head.weight, 0.1)
    assert not in_place or scorer.accumulate_in_place(head_is_used=True)
    ranks = Ranks("cpu")
    forwarder = Forwarder(ranks.wrap(scorer), ranks, budget, "float32")
    metrics = backward(algorithm, forwarder, step())
    return metrics, [p.grad for p in scorer.parameters() if p.grad is not None]


@pytest.mark.parametrize(("algorithm", "values"), [(TokenMean(), False), (Sorted(), True)], ids=["plain", "coupled"])
def test_any_cut_gives_the_same_loss_metrics_and_gradient(tiny_model, algorithm, values):
    whole, expected = gradients(tiny_model, algorithm, 10_000, values)
    cut, found = gradients(tiny_model, algorithm, 20, values)
    assert cut == pytest.approx(whole, abs=1e-6)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert max(float(g.abs().max()) for g in expected) > 1e-3


FAST = [Paths(layout, tiled, keep_bytes) for layout in ("causal", "shared") for tiled, keep_bytes in KEPT]


@pytest.mark.parametrize("paths", FAST, ids=str)
@pytest.mark.parametrize(("algorithm", "values"), [(TokenMean(), False), (Sorted(), True)], ids=["plain", "coupled"])
def test_every_path_gives_the_loss_and_gradient_of_the_plain_one(tiny_model, algorithm, values, paths):
    whole, expected = gradients(tiny_model, algorithm, 10_000, values)
    for budget, in_place in ((10_000, False), (20, False), (20, True)):
        fast, found = gradients(tiny_model, algorithm, budget, values, paths, in_place)
        assert fast == pytest.approx(whole, abs=1e-5)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_coupled_loss_really_couples():
    """Guards the test above: cut into pieces, this loss would be another one."""
    x = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0, 2.0, 0.0, 1.0])
    batch = step().batch

    def loss(part: Batch, rows: slice) -> float:
        logps = x[rows, None] * torch.ones(part.mask.shape)
        return float(Sorted().loss(part, Policy({"logps": logps, "values": 0 * logps})).value)

    pieces = loss(batch.select(range(4)), slice(0, 4)) + loss(batch.select(range(4, 8)), slice(4, 8))
    assert abs(loss(batch, slice(0, 8)) - pieces) > 0.1


def test_tokens_are_counted_without_padding(tiny_model):
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    ranks = Ranks("cpu")
    forwarder = Forwarder(scorer, ranks, 30, "float32")
    built = step()
    backward(TokenMean(), forwarder, built)
    forwarder.whole(built, ("logps",))
    total = sum(map(len, built.tokens))
    assert (forwarder.meter.backward, forwarder.meter.forward) == (total, total)


class Constant(TokenMean):
    name = "constant"

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        return Loss(torch.zeros(()))


class Vector(TokenMean):
    name = "vector"

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        return Loss(batch.sum_tokens(policy.logps))


@pytest.mark.parametrize("algorithm", [Constant(), Vector()], ids=["constant", "vector"])
def test_a_loss_that_is_no_scalar_with_a_gradient_is_refused_by_name(tiny_model, algorithm):
    with pytest.raises(PluginError, match=f"{type(algorithm).__name__}.loss must give a scalar with a gradient"):
        gradients(tiny_model, algorithm, 10_000)


class OldOfChosen(TokenMean):
    name = "old_of_chosen"

    def needs(self) -> Needs:
        return Needs(before={"old_logps": {Role.CHOSEN}, "old_values": {Role.REJECTED}}, during={"logps"})


def test_a_column_is_filled_for_the_roles_that_ask_and_is_zero_elsewhere(tiny_model):
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), values=True)
    torch.nn.init.constant_(scorer.value_head.bias, 0.5)
    forwarder = Forwarder(scorer, Ranks("cpu"), 30, "float32")
    built = step()
    filled = fill(built, OldOfChosen(), forwarder, None).batch
    live = forwarder.whole(built, ("logps", "values"))
    chosen = filled.role == Role.CHOSEN
    assert torch.allclose(filled.old_logps[chosen], live["logps"][chosen], atol=1e-6)
    assert filled.old_logps[~chosen].abs().sum() == 0
    assert filled.old_values[chosen].abs().sum() == 0
    assert bool((filled.old_values[~chosen][filled.mask[~chosen]] == 0.5).all())
