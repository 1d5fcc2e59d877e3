from __future__ import annotations

from itertools import chain

import pytest

from prefopt.engine.plan import Micro, Unit, plan

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
