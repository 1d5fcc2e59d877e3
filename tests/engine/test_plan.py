from __future__ import annotations

import random
from itertools import chain, combinations

import pytest

from prefopt.engine.plan import OVERHEAD, Micro, Unit, plan

LENGTHS = [9, 4, 4, 7, 2, 3, 5, 5]
GROUPS = [0, 0, 1, 1, 2, 2, 3, 3]
UNITS = [Unit((i, i + 1), 2, max(LENGTHS[i : i + 2])) for i in range(0, 8, 2)]


def test_groups_stay_whole_and_nothing_is_lost():
    (micros,) = plan(UNITS, budget=20)
    assert sorted(chain(*(m.index for m in micros))) == list(range(8))
    for micro in micros:
        assert all(GROUPS.count(GROUPS[i]) == sum(GROUPS[j] == GROUPS[i] for j in micro.index) for i in micro.index)
    assert all(max(LENGTHS[i] for i in m.index) * len(m.index) <= 20 for m in micros)


def test_short_groups_come_first():
    (micros,) = plan(UNITS, budget=10)
    assert micros[0].index == (4, 5)
    assert micros[-1].index == (0, 1)


def test_a_group_over_the_budget_goes_alone():
    assert plan([Unit((0, 1), 2, 50)], budget=10) == [[Micro((0, 1))]]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_rank_runs_equally_many_and_the_idle_ones_count_for_nothing(world):
    ranks = plan(UNITS, budget=12, world=world)
    assert len(ranks) == world
    assert len({len(micros) for micros in ranks}) == 1
    working = [i for micros in ranks for m in micros if not m.idle for i in m.index]
    assert sorted(working) == list(range(8))
    assert all(m.index for micros in ranks for m in micros)


def test_nothing_to_plan():
    assert plan([], budget=10, world=2) == [[], []]


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_is_cheaper(seed):
    """Of all 2^8 ways to cut nine units in order of width, by the definition of the cost."""
    draw, budget = random.Random(seed), 64
    units = [Unit((i,), draw.randint(1, 2), draw.randint(1, 40)) for i in range(9)]

    def cost(cut: list[list[Unit]]) -> float:
        sizes = [sum(u.rows for u in part) * max(u.width for u in part) for part in cut]
        over = any(size > budget and len(part) > 1 for size, part in zip(sizes, cut, strict=True))
        return float("inf") if over else sum(sizes) + len(cut) * budget / OVERHEAD

    ordered = sorted(units, key=lambda u: u.width)
    marks = (m for n in range(9) for m in combinations(range(1, 9), n))
    cuts = ([ordered[a:b] for a, b in zip((0, *m), (*m, 9), strict=True)] for m in marks)
    (micros,) = plan(units, budget)
    found = [[units[i] for i in micro.index] for micro in micros]
    assert cost(found) == min(map(cost, cuts))
    assert len(found) > 1
