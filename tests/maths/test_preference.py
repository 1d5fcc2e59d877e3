"""Against float64 oracles written from the definitions, without tensors."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from prefopt.maths import plackett_luce_nll, preference_nll


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("margin", [-3.0, -0.1, 0.0, 0.7, 12.0])
@pytest.mark.parametrize("flipped", [0.0, 0.1, 0.5])
def test_preference_nll_is_the_cross_entropy_of_its_definition(margin, flipped):
    expected = -(1 - flipped) * math.log(sigmoid(margin)) - flipped * math.log(sigmoid(-margin))
    found = preference_nll(torch.tensor(margin, dtype=torch.double), flipped)
    assert float(found) == pytest.approx(expected, abs=1e-10)


def test_preference_nll_is_finite_where_the_definition_overflows():
    x = torch.tensor([-1e4, 1e4], dtype=torch.double, requires_grad=True)
    nll = preference_nll(x, torch.tensor([0.1, 0.5], dtype=torch.double))
    nll.sum().backward()
    assert nll.tolist() == pytest.approx([9000.0, 5000.0])
    assert x.grad.tolist() == pytest.approx([-0.9, 0.5])


def sequential_draws(scores: list[float], order: list[int]) -> float:
    """Plackett-Luce as it is told: draw the best, then the best of the rest, and so on."""
    left, probability = list(range(len(scores))), 1.0
    for k in order:
        probability *= math.exp(scores[k]) / sum(math.exp(scores[i]) for i in left)
        left.remove(k)
    return probability


SCORES = [0.3, -1.2, 2.0, 0.0]


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_plackett_luce_is_the_probability_of_sequential_draws(order):
    ranks = [list(order).index(i) for i in range(4)]
    expected = -math.log(sequential_draws(SCORES, list(order)))
    found = plackett_luce_nll(
        torch.tensor([SCORES], dtype=torch.double), torch.tensor([ranks]).double(), torch.ones(1, 4).bool()
    )
    assert found.tolist() == pytest.approx([expected], abs=1e-10)


def test_probabilities_of_all_rankings_sum_to_one():
    orders = list(permutations(range(4)))
    ranks = torch.tensor([[order.index(i) for i in range(4)] for order in orders]).double()
    scores = torch.tensor([SCORES], dtype=torch.double).expand(len(orders), -1)
    total = plackett_luce_nll(scores, ranks, torch.ones(len(orders), 4).bool()).neg().exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-12)


def test_two_completions_are_bradley_terry():
    scores = torch.tensor([[0.4, 1.1]], dtype=torch.double)
    nll = plackett_luce_nll(scores, torch.tensor([[1.0, 0.0]]).double(), torch.ones(1, 2).bool())
    assert nll.tolist() == pytest.approx(preference_nll(scores[:, 1] - scores[:, 0]).tolist(), abs=1e-12)


def test_tied_completions_compete_with_each_other_and_all_below():
    scores = torch.tensor([SCORES], dtype=torch.double)
    e = [math.exp(s) for s in SCORES]
    below = e[0] + e[1] + e[3]  # ranks: 2 first, then 0 and 3 tied, then 1
    expected = -math.log(e[2] / sum(e)) - math.log(e[0] / below) - math.log(e[3] / below)
    found = plackett_luce_nll(scores, torch.tensor([[1.0, 2, 0, 1]]).double(), torch.ones(1, 4).bool())
    assert found.tolist() == pytest.approx([expected], abs=1e-10)


def test_absent_members_change_nothing_and_get_no_gradient():
    scores = torch.tensor([[0.4, 1.1, 50.0]], dtype=torch.double, requires_grad=True)
    present = torch.tensor([[True, True, False]])
    nll = plackett_luce_nll(scores, torch.tensor([[0.0, 1, 0]]).double(), present)
    nll.sum().backward()
    assert nll.tolist() == pytest.approx(preference_nll(torch.tensor([0.4 - 1.1]).double()).tolist())
    assert scores.grad[0, 2] == 0
    assert torch.isfinite(scores.grad).all()
