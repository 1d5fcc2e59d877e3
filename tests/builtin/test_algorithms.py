"""SFT and reward models against oracles in float64, written from the definitions with plain numbers."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch

from prefopt.batch import Batch, Policy
from prefopt.builtin.algorithms import DynamicFineTuning, RewardModel, RewardModelListwise, SupervisedFineTuning
from prefopt.errors import DataError
from prefopt.rows import Completion, Demonstration, Message, Role
from prefopt.testing import conformance, pinned

METHODS = (SupervisedFineTuning, DynamicFineTuning, RewardModel, RewardModelListwise)
OTHERS = (
    SupervisedFineTuning(scope="sequence"),
    DynamicFineTuning(scope="sequence"),
    RewardModel(margin=True, centre=0.01),
    RewardModel(labels="hard"),
)
test_conformance = conformance(*METHODS, *OTHERS)
test_numbers_stay = pinned(Path(__file__).with_name("pins.json"), *METHODS, *OTHERS)


def test_the_whole_sequence_is_scored_as_one_and_a_conversation_is_not():
    row = Demonstration(prompt="Say: ", completion=Completion("a", ids=(1, 2)))
    (found,) = SupervisedFineTuning(scope="sequence").arrange([row])
    assert (found.prompt, found.completion.text, found.completion.ids) == ("", "Say: a", None)
    talk = Demonstration(prompt=(Message("user", "Hi"),), completion=Completion("a"))
    with pytest.raises(DataError, match="never scored as a whole"):
        SupervisedFineTuning(scope="sequence").arrange([talk])


def test_sft_is_the_mean_over_all_completion_tokens():
    logps = [[-0.1, -2.0, 9.0], [-1.5, 9.0, 9.0], [-0.7, -0.2, -3.0]]
    batch = Batch.build([[1, 2], [3], [4, 5, 6]], role=[0, 0, 0], group=[0, 1, 2])
    loss = SupervisedFineTuning().loss(batch, Policy({"logps": torch.tensor(logps, dtype=torch.double)}))
    assert loss.value.item() == pytest.approx((0.1 + 2.0 + 1.5 + 0.7 + 0.2 + 3.0) / 6, abs=1e-10)


SCORES = [(1.2, -0.4), (-0.3, 0.9), (0.5, 0.5), (2.0, -1.0)]
PREFERENCE = [1.0, 0.8, 0.5, 1.0]
MARGIN = [0.5, 1.0, 0.0, 2.0]


def pair_batch() -> Batch:
    columns = {name: torch.tensor(x, dtype=torch.double).repeat_interleave(2) for name, x in _fields().items()}
    return Batch.build(
        [[1]] * 8, role=[Role.CHOSEN, Role.REJECTED] * 4, group=[0, 0, 1, 1, 2, 2, 3, 3], columns=columns
    )


def _fields() -> dict[str, list[float]]:
    return {"preference": PREFERENCE, "margin": MARGIN}


def oracle(labels: str, margin: bool, centre: float) -> float:
    total = 0.0
    for (won, lost), p, m in zip(SCORES, PREFERENCE, MARGIN, strict=True):
        d = won - lost - (m if margin else 0.0)
        win, lose = -math.log(1 / (1 + math.exp(-d))), -math.log(1 / (1 + math.exp(d)))
        if labels == "soft":
            total += p * win + (1 - p) * lose
        else:
            total += win if p != 0.5 else 0.0
        total += centre * (won + lost) ** 2
    return total / len(SCORES)


@pytest.mark.parametrize("labels", ["soft", "hard"])
@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centre", [0.0, 0.01])
def test_reward_model_equals_its_definition(labels, margin, centre):
    scores = torch.tensor([x for pair in SCORES for x in pair], dtype=torch.double)
    loss = RewardModel(labels=labels, margin=margin, centre=centre).loss(pair_batch(), Policy({"scores": scores}))
    assert loss.value.item() == pytest.approx(oracle(labels, margin, centre), abs=1e-10)


def test_reward_model_metrics():
    scores = torch.tensor([x for pair in SCORES for x in pair], dtype=torch.double)
    metrics = RewardModel().loss(pair_batch(), Policy({"scores": scores})).metrics
    assert metrics["reward/accuracy"].item() == (1 + 0 + 0.5 + 1) / 4
    assert metrics["reward/margin"].item() == pytest.approx((1.6 - 1.2 + 0 + 3) / 4, abs=1e-10)
    chances = [1 / (1 + math.exp(-d)) for d in (1.6, -1.2, 0.0, 3.0)]
    brier = sum((c - p) ** 2 for c, p in zip(chances, PREFERENCE, strict=True)) / 4
    assert metrics["calibration/brier"].item() == pytest.approx(brier, abs=1e-10)


def test_a_tie_pulls_scores_together():
    scores = torch.tensor([2.0, -1.0], dtype=torch.double, requires_grad=True)
    batch = Batch.build([[1], [1]], role=[1, 2], group=[0, 0], columns={"preference": torch.tensor([0.5, 0.5])})
    RewardModel().loss(batch, Policy({"scores": scores})).value.backward()
    assert scores.grad[0] > 0 > scores.grad[1]


RANKINGS = [([0.3, -1.2, 2.0], [1, 2, 0]), ([0.5, 0.1, -0.4, 1.0], [0, 1, 3, 1]), ([0.7, -0.2], [0, 0])]


def test_listwise_equals_its_definition_with_groups_of_different_size_and_ties():
    rows = [sorted(zip(ranks, scores, strict=True)) for scores, ranks in RANKINGS]
    flat = [(g, rank, score) for g, row in enumerate(rows) for rank, score in row]
    batch = Batch.build(
        [[1]] * len(flat),
        role=[Role.RANKED] * len(flat),
        group=[g for g, _, _ in flat],
        columns={"rank": torch.tensor([float(rank) for _, rank, _ in flat])},
    )
    scores = torch.tensor([score for _, _, score in flat], dtype=torch.double)
    loss = RewardModelListwise().loss(batch, Policy({"scores": scores}))
    expected, right, errors = 0.0, [], []
    for scores_, ranks in RANKINGS:
        for s, r in zip(scores_, ranks, strict=True):
            rivals = sum(math.exp(x) for x, q in zip(scores_, ranks, strict=True) if q >= r)
            expected += math.log(rivals) - s
        told = [(i, j) for i, j in combinations(range(len(ranks)), 2) if ranks[i] != ranks[j]]
        pairs = [(scores_[i] > scores_[j]) == (ranks[i] < ranks[j]) for i, j in told]
        right.append(sum(pairs) / len(pairs) if pairs else 0.5)
        chances = [(1 / (1 + math.exp(scores_[j] - scores_[i])), i, j) for i, j in combinations(range(len(ranks)), 2)]
        labels = [0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]) for _, i, j in chances]
        errors.append(sum((p - y) ** 2 for (p, _, _), y in zip(chances, labels, strict=True)) / len(labels))
    assert loss.value.item() == pytest.approx(expected / 3, abs=1e-10)
    assert loss.metrics["reward/accuracy"].item() == pytest.approx(sum(right) / 3, abs=1e-10)
    assert loss.metrics["calibration/brier"].item() == pytest.approx(sum(errors) / 3, abs=1e-10)


def test_listwise_is_as_calibrated_on_pairs_as_the_pairwise_model():
    scores, ranks = torch.tensor([0.8, -0.3, 0.1, 0.4]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    ranked = Batch.build([[1]] * 4, role=[Role.RANKED] * 4, group=[0, 0, 1, 1], columns={"rank": ranks})
    pairs = Batch.build(
        [[1]] * 4,
        role=[Role.CHOSEN, Role.REJECTED] * 2,
        group=[0, 0, 1, 1],
        columns={"preference": torch.tensor([1.0, 0.0, 1.0, 0.0])},
    )
    listwise = RewardModelListwise().loss(ranked, Policy({"scores": scores})).metrics
    pairwise = RewardModel().loss(pairs, Policy({"scores": scores})).metrics
    for name in ("reward/accuracy", "calibration/brier"):
        assert listwise[name].item() == pytest.approx(pairwise[name].item())
