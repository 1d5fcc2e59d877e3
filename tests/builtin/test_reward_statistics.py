"""Listwise rankings, soft labels and ties each beat plain Bradley-Terry on data made for them.

The reward is linear in known features, so that each loss is fitted to its optimum; the data is drawn again for 40 seeds
and the held-out accuracy of the fitted rewards is compared by a paired t-test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from scipy.stats import ttest_rel
from torch import Tensor

from prefopt.api import Algorithm, Batch, Policy
from prefopt.builtin.algorithms import RewardModel, RewardModelListwise
from prefopt.rows import Role

SEEDS, FEATURES = 40, 10


@dataclass
class World:
    """A true reward and what can be drawn from it."""

    seed: int
    scale: float = 2.0

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        weights = self.normal(FEATURES)
        self.weights = weights / weights.norm() * self.scale

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.double)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.double)

    def logistic(self, *shape: int) -> Tensor:
        u = self.uniform(*shape)
        return u.log() - (1 - u).log()

    def accuracy(self, found: Tensor) -> float:
        """Share of 4,000 fresh pairs that the fitted weights put in the true order."""
        gap = self.normal(4000, FEATURES)
        return float(((gap @ found > 0) == (gap @ self.weights > 0)).double().mean())


def fit(algorithm: Algorithm, batch: Batch, features: Tensor) -> Tensor:
    """The weights that minimise the algorithm's loss (with a little ridge, the same for all)."""
    weights = torch.zeros(FEATURES, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = algorithm.loss(batch, Policy({"scores": features @ weights})).value + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def pairs(features: Tensor, preference: Tensor) -> tuple[Batch, Tensor]:
    """Pairs [P, 2, d] with P(first better) as a batch, turned so that the preferred side is chosen."""
    turned = torch.where((preference < 0.5)[:, None, None], features.flip(1), features)
    count = len(turned)
    labels = torch.maximum(preference, 1 - preference).repeat_interleave(2)
    roles, groups = [Role.CHOSEN, Role.REJECTED] * count, [i for i in range(count) for _ in range(2)]
    batch = Batch.build([[1]] * (2 * count), roles, groups, columns={"preference": labels})
    return batch, turned.reshape(2 * count, -1)


Fits = tuple[float, float]


def rankings(world: World, count: int = 60, size: int = 8) -> Fits:
    """Rankings by Plackett-Luce: as wholes, and as all their pairs."""
    features = world.normal(count, size, FEATURES)
    noise = -(-world.uniform(count, size).log()).log()
    ranks = (-(features @ world.weights + noise)).argsort(1).argsort(1)
    whole = Batch.build(
        [[1]] * (count * size),
        [Role.RANKED] * (count * size),
        [i for i in range(count) for _ in range(size)],
        columns={"rank": ranks.double().flatten()},
    )
    i, j = (list(index) for index in zip(*combinations(range(size), 2), strict=True))
    both = torch.stack((features[:, i], features[:, j]), 2).flatten(0, 1)
    split = pairs(both, (ranks[:, i] < ranks[:, j]).double().flatten())
    listwise = fit(RewardModelListwise(), whole, features.flatten(0, 1))
    return world.accuracy(listwise), world.accuracy(fit(RewardModel(), *split))


def votes(world: World, count: int = 120, voters: int = 5) -> Fits:
    """Pairs seen by five people: the share of votes as a soft label, and the majority as a hard one."""
    features = world.normal(count, 2, FEATURES)
    gap = (features[:, 0] - features[:, 1]) @ world.weights
    share = (gap[:, None] + world.logistic(count, voters) > 0).double().mean(1)
    return tuple(world.accuracy(fit(RewardModel(labels=kind), *pairs(features, share))) for kind in ("soft", "hard"))


def ties(world: World, count: int = 120, width: float = 1.5) -> Fits:
    """Pairs of which many are tied (Rao & Kupper): ties as one half, and ties left out."""
    features = world.normal(count, 2, FEATURES)
    felt = (features[:, 0] - features[:, 1]) @ world.weights + world.logistic(count)
    label = torch.where(felt.abs() < width, 0.5, (felt > 0).double())
    return tuple(world.accuracy(fit(RewardModel(labels=kind), *pairs(features, label))) for kind in ("soft", "hard"))


@pytest.mark.parametrize("experiment", [rankings, votes, ties])
def test_each_beats_plain_bradley_terry_on_data_made_for_it(experiment: Callable[[World], Fits]):
    ours, plain = zip(*(experiment(World(seed)) for seed in range(SEEDS)), strict=True)
    gain = sum(ours) / SEEDS - sum(plain) / SEEDS
    test = ttest_rel(ours, plain, alternative="greater")
    print(f"{experiment.__name__}: {sum(ours) / SEEDS:.4f} against {sum(plain) / SEEDS:.4f}, p = {test.pvalue:.1e}")
    assert gain > 0.001
    assert test.pvalue < 1e-3
