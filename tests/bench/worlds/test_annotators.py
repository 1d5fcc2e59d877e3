"""Simulated people against the models they are said to follow."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from prefopt.api import Completion, Pair
from prefopt.bench.worlds.replies.annotators import Annotators
from prefopt.bench.worlds.replies.language import read_request
from prefopt.engine.services import EngineServices

PROMPT = "Customer: I want my money back for order 1130.\nShop:"
GOOD = " Hello! We have refunded order 1130. Have a nice day!"
FAIR = " We have refunded order 1251."
POOR = " We need some more time."


def pool(**settings):
    return Annotators(**{"tastes": 0, "flips": 0, "flattery": 0, "length": 0, **settings}).pool(
        np.random.default_rng(0)
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_choices_follow_bradley_terry_at_the_temperature():
    people = pool(temperature=2.0)
    verdict = people.verdict(Pair(PROMPT, Completion(GOOD), Completion(FAIR)))
    assert verdict.a_better == pytest.approx(sigmoid((4.0 - 2.0) / 2.0))
    rng = np.random.default_rng(1)
    wins = sum(people.vote(PROMPT, GOOD, FAIR, 0, rng) > 0 for _ in range(4000))
    assert wins / 4000 == pytest.approx(verdict.a_better, abs=0.02)


def test_a_margin_is_how_much_better_the_majority_finds_the_chosen_side(plugins):
    source = plugins.find("data source", "replies").model_validate({"format": "comparisons", "size": 200})
    rows = source.open(EngineServices(0))
    told = [row for row in rows if row.preference != 0.5]
    assert len(told) > 100
    assert all(row.margin > 0 for row in told)
    assert all(row.margin is None for row in rows if row.preference == 0.5)


def test_flips_turn_answers_round():
    fair, flipped = (
        pool(temperature=2.0, flips=f).verdict(Pair(PROMPT, Completion(GOOD), Completion(FAIR))) for f in (0, 0.2)
    )
    assert flipped.a_better == pytest.approx(0.8 * fair.a_better + 0.2 * (1 - fair.a_better))


def test_ties_follow_rao_and_kupper():
    people = pool(temperature=1.0, tie_width=0.8)
    verdict = people.verdict(Pair(PROMPT, Completion(GOOD), Completion(FAIR)))
    assert verdict.a_better == pytest.approx(sigmoid(2.0 - 0.8))
    assert verdict.tie == pytest.approx(1 - sigmoid(2.0 - 0.8) - sigmoid(-2.0 - 0.8))
    rng = np.random.default_rng(1)
    ties = sum(people.vote(PROMPT, GOOD, FAIR, 0, rng) == 0 for _ in range(4000))
    assert ties / 4000 == pytest.approx(verdict.tie, abs=0.02)


def test_rankings_follow_plackett_luce():
    people, rng = pool(temperature=2.0), np.random.default_rng(2)
    replies = [GOOD, FAIR, POOR]
    request = read_request(PROMPT)
    weight = [math.exp(people.utilities(request, r)[0] / 2.0) for r in replies]
    expected, counts = [], dict.fromkeys(permutations(range(3)), 0)
    for order in counts:
        left, chance = list(range(3)), 1.0
        for i in order:
            chance *= weight[i] / sum(weight[j] for j in left)
            left.remove(i)
        expected.append(chance)
    draws = 3000
    for _ in range(draws):
        ranks = people.rank(PROMPT, replies, 0, rng)
        counts[tuple(ranks.index(place) for place in range(3))] += 1
    assert chisquare(list(counts.values()), [p * draws for p in expected]).pvalue > 0.001


def test_tastes_are_individual_and_drawn_from_the_seed():
    tastes = Annotators(people=7, tastes=0.5).pool(np.random.default_rng(3)).tastes
    assert tastes.shape == (7, 4)
    assert np.std(tastes) == pytest.approx(0.5, abs=0.2)
    assert len({tuple(row) for row in tastes}) == 7
    one, same, other = (Annotators().open(EngineServices(s)) for s in (0, 0, 1))
    pairs = [Pair(PROMPT, Completion(GOOD), Completion(FAIR))]
    assert one(pairs) == same(pairs) != other(pairs)


def test_people_like_flattery_and_length_and_gold_does_not():
    request = read_request(PROMPT)
    flattered, padded = GOOD + " You are absolutely right!", GOOD + " We value every customer."
    plain = pool().utilities(request, GOOD)[0]
    assert pool().utilities(request, flattered)[0] == pool().utilities(request, padded)[0] == plain - 0.25
    assert pool(flattery=0.5).utilities(request, flattered)[0] == plain + 0.25
    assert pool(length=0.1).utilities(request, padded)[0] == pytest.approx(plain - 0.25 + 0.4)
    four, five = (GOOD + " What a wonderful question!" * n for n in (4, 5))
    gain = [pool(flattery=5.0).utilities(request, r)[0] - pool().utilities(request, r)[0] for r in (four, five)]
    assert gain == pytest.approx([15.0, 15.0])
