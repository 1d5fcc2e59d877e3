"""Against float64 loops written from the definitions, and against exact sums over a distribution of three."""

from __future__ import annotations

import math
from statistics import fmean, stdev, variance

import pytest
import torch
from torch import Tensor

from prefopt.maths import (
    adapted_coefficient,
    at_last,
    clipped_surrogate,
    clipped_value_loss,
    discounted_returns,
    gae,
    group_centred,
    group_std,
    importance_weight,
    kl_estimate,
    leave_one_out,
    merged_moments,
    moments_std,
    outside_clip,
    whiten,
)

LENGTHS = (4, 1, 3, 6)
MASK = torch.tensor([[t < n for t in range(6)] for n in LENGTHS])
GAPS = torch.tensor([[True, False, True, True, False, False], [False, True, False, False, True, True]])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def real(x: Tensor, mask: Tensor = MASK) -> list[list[float]]:
    """The real tokens of each sequence, as lists of numbers."""
    return [row[keep].tolist() for row, keep in zip(x, mask, strict=True)]


def close(found: Tensor, expected: list[list[float]], mask: Tensor = MASK) -> None:
    for own, other in zip(real(found, mask), expected, strict=True):
        assert own == pytest.approx(other, abs=1e-10)
    assert (found[~mask] == 0).all()


# --- divergences ----------------------------------------------------------------------------------------------------


def categorical(logits: list[float]) -> tuple[Tensor, Tensor]:
    """Free logits, and the log-probabilities they make."""
    free = torch.tensor(logits, dtype=torch.double, requires_grad=True)
    return free, torch.log_softmax(free, -1)


def slope(value: Tensor, free: Tensor) -> Tensor:
    return torch.autograd.grad(value, free, retain_graph=True)[0]


REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double).log()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    _, logps = categorical([0.3, -1.0, 0.9])
    exact = (logps.exp() * (logps - REFERENCE)).sum()
    found = (logps.exp() * kl_estimate(logps - REFERENCE, estimator)).sum()
    assert found.item() == pytest.approx(exact.item(), abs=1e-12)


def test_the_gradients_of_the_estimators_are_three_different_things():
    """Of KL(π || ref) for k2, of KL(ref || π) for k3, and of nothing for k1: the mean over samples of π, exactly."""
    free, logps = categorical([0.3, -1.0, 0.9])
    forward, reverse = (logps.exp() * (logps - REFERENCE)).sum(), (REFERENCE.exp() * (REFERENCE - logps)).sum()
    meant = {"k1": torch.zeros(3, dtype=torch.double), "k2": slope(forward, free), "k3": slope(reverse, free)}
    for estimator, expected in meant.items():
        found = slope((logps.exp().detach() * kl_estimate(logps - REFERENCE, estimator)).sum(), free)
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_a_log_ratio_weighted_by_itself_has_the_gradient_of_the_divergence():
    """KL in the reward: the policy gradient with the reward -k1 is minus the gradient of KL(π || ref)."""
    free, logps = categorical([0.3, -1.0, 0.9])
    exact = slope((logps.exp() * (logps - REFERENCE)).sum(), free)
    reward = -(logps - REFERENCE).detach()
    found = slope((logps.exp().detach() * reward * logps).sum(), free)
    assert found.tolist() == pytest.approx((-exact).tolist(), abs=1e-12)


def test_k2_and_k3_are_never_negative_and_finite_far_away():
    for dtype in (torch.float32, torch.double):
        x = torch.tensor([-1e4, -100.0, -1e-3, 0.0, 2.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
        for estimator in ("k1", "k2", "k3"):
            found = kl_estimate(x, estimator)
            assert found.isfinite().all()
            assert torch.autograd.grad(found.sum(), x)[0].isfinite().all()
            assert estimator == "k1" or (found >= 0).all()


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.1), (7.5, 0.102), (600.0, 0.102), (5.7, 0.0995), (0.0, 0.098)])
def test_the_controller_moves_by_at_most_a_fifth_of_samples_over_horizon(kl, expected):
    coefficient = torch.tensor(0.1, dtype=torch.double)
    found = adapted_coefficient(coefficient, torch.tensor(kl, dtype=torch.double), 6.0, samples=100, horizon=1000)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_importance_weights_are_ratios_up_to_their_cap():
    found = importance_weight(torch.tensor([-1.0, 0.5, 1e4], dtype=torch.double), cap=2.0)
    assert found.tolist() == pytest.approx([math.exp(-1), math.exp(0.5), 2.0], abs=1e-12)


# --- rewards, values, advantages ------------------------------------------------------------------------------------


def test_a_score_stands_at_the_last_real_token():
    assert at_last(torch.tensor([1.0, 2.0]), GAPS).tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 2]]
    assert at_last(torch.tensor([3.0]), torch.tensor([[False, False]])).tolist() == [[0, 0]]


def loop_gae(rewards: list[float], values: list[float], discount: float, decay: float, after: float) -> list[float]:
    """Σ_k (γλ)^k δ_{t+k}, summed anew for every token."""
    following = [*values[1:], after]
    surprises = [r + discount * v - own for r, v, own in zip(rewards, following, values, strict=True)]
    return [sum((discount * decay) ** k * x for k, x in enumerate(surprises[t:])) for t in range(len(surprises))]


@pytest.mark.parametrize("mask", [MASK, GAPS], ids=["padding", "gaps"])
@pytest.mark.parametrize(("discount", "decay"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.95), (0.7, 0.0)])
def test_gae_is_its_definition_and_never_sees_what_is_masked(mask, discount, decay):
    rewards, values, after = numbers(*mask.shape), numbers(*mask.shape, seed=1), numbers(len(mask), seed=2)
    found = gae(rewards, values, mask, discount, decay, after)
    expected = [
        loop_gae(r, v, discount, decay, end)
        for r, v, end in zip(real(rewards, mask), real(values, mask), after.tolist(), strict=True)
    ]
    close(found, expected, mask)
    wider = torch.nn.functional.pad(mask, (0, 3))
    padded = (torch.nn.functional.pad(x, (0, 3), value=9.0) for x in (rewards, values))
    assert torch.equal(gae(*padded, wider, discount, decay, after)[:, : mask.shape[1]], found)


def test_returns_of_gae_are_monte_carlo_returns_when_nothing_decays():
    rewards, values = numbers(4, 6), numbers(4, 6, seed=1)
    returns = gae(rewards, values, MASK, 0.9, 1.0) + values
    close(returns.masked_fill(~MASK, 0.0), real(discounted_returns(rewards, MASK, 0.9)))


def test_discounted_returns_are_their_sums():
    rewards = numbers(4, 6)
    expected = [[sum(0.8**k * r for k, r in enumerate(row[t:])) for t in range(len(row))] for row in real(rewards)]
    close(discounted_returns(rewards, MASK, 0.8), expected)


def test_whitening_sees_real_tokens_only():
    x = numbers(4, 6) * 3 + 5
    flat = [value for row in real(x) for value in row]
    mean, scale = fmean(flat), math.sqrt(variance(flat) + 1e-8)
    close(whiten(x, MASK), [[(value - mean) / scale for value in row] for row in real(x)])
    close(whiten(x, MASK, shift_mean=False), [[(value - mean) / scale + mean for value in row] for row in real(x)])
    kept = whiten(x, MASK, shift_mean=False)[MASK]
    assert kept.mean().item() == pytest.approx(mean)
    assert kept.var().item() == pytest.approx(1.0, abs=1e-6)


def test_whitening_of_one_number_or_none_is_finite():
    one = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[4.0, 9.0]]), one).tolist() == [[0, 0]]
    assert whiten(torch.tensor([[4.0, 9.0]]), one, shift_mean=False).tolist() == [[4, 0]]
    assert whiten(torch.tensor([[4.0, 9.0]]), ~(one | True)).tolist() == [[0, 0]]


# --- groups ---------------------------------------------------------------------------------------------------------

GROUP = torch.tensor([7, 2, 7, 7, 2, 5])


def others(x: list[float], i: int) -> list[float]:
    return [value for j, value in enumerate(x) if GROUP[j] == GROUP[i] and j != i]


def test_group_statistics_are_those_of_each_group():
    x = numbers(6).tolist()
    own = [[x[i], *others(x, i)] for i in range(6)]
    column = torch.tensor(x, dtype=torch.double)
    assert group_centred(column, GROUP).tolist() == pytest.approx([x[i] - fmean(own[i]) for i in range(6)], abs=1e-12)
    spread = [stdev(values) if len(values) > 1 else 0.0 for values in own]
    assert group_std(column, GROUP).tolist() == pytest.approx(spread, abs=1e-12)
    whole = [math.sqrt(fmean((v - fmean(values)) ** 2 for v in values)) for values in own]
    assert group_std(column, GROUP, ddof=0).tolist() == pytest.approx(whole, abs=1e-12)


def test_leaving_one_out_compares_with_the_mean_of_the_others():
    x = numbers(6).tolist()
    found = leave_one_out(torch.tensor(x, dtype=torch.double), GROUP).tolist()
    expected = [x[i] - fmean(others(x, i)) if others(x, i) else 0.0 for i in range(6)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_scores_have_no_advantage_to_the_last_bit(score):
    equal = torch.full((7,), score)
    group = torch.zeros(7, dtype=torch.long)
    for found in (group_centred(equal, group), leave_one_out(equal, group), group_std(equal, group)):
        assert found.tolist() == [0.0] * 7


# --- running moments ------------------------------------------------------------------------------------------------


def test_moments_of_parts_are_those_of_the_whole():
    x = numbers(11) * 4 - 2
    moments = torch.zeros(3, dtype=torch.double)
    for part in (x[:1], x[1:1], x[1:6], x[6:]):
        moments = merged_moments(moments, part)
    count, mean, _ = moments.tolist()
    assert (count, mean) == (11, pytest.approx(fmean(x.tolist()), abs=1e-12))
    assert moments_std(moments, eps=0.0).item() == pytest.approx(stdev(x.tolist()), abs=1e-12)
    assert moments_std(merged_moments(torch.zeros(3), x[:1])).item() == 1


# --- objectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [None, 1.5])
def test_the_clipped_surrogate_is_its_definition(dual):
    for ratio in (0.3, 0.8, 1.0, 1.25, 1.3, 4.0):
        for advantage in (-2.0, 0.0, 0.5):
            clipped = min(max(ratio, 0.8), 1.28)
            gain = min(ratio * advantage, clipped * advantage)
            if dual is not None and advantage < 0:
                gain = max(gain, dual * advantage)
            x, a = torch.tensor(ratio, dtype=torch.double).log().requires_grad_(), torch.tensor(advantage)
            found = clipped_surrogate(x, a.double(), 0.2, 0.28, dual)
            assert found.item() == pytest.approx(-gain, abs=1e-12)
            if dual is None and advantage:
                flat = torch.autograd.grad(found, x)[0].item() == 0
                assert flat == outside_clip(x.detach(), a, 0.2, 0.28).item()


def test_the_value_loss_takes_the_larger_error_and_halves_it():
    for value in (-1.0, 0.0, 0.1, 2.0):
        for target in (-0.5, 1.0):
            near = min(max(value, -0.2), 0.2)
            expected = max((value - target) ** 2, (near - target) ** 2) / 2
            parts = (torch.tensor(x, dtype=torch.double) for x in (value, 0.0, target))
            assert clipped_value_loss(*parts, 0.2).item() == pytest.approx(expected, abs=1e-12)
    free = clipped_value_loss(*(torch.tensor(x) for x in (2.0, 0.0, 1.0)), None)
    assert free.item() == 0.5
