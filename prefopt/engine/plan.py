"""Cuts a minibatch into microbatches. Knows the sizes of units only; the losses are normalised so that any cut is
exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OVERHEAD = 16
"""A forward and backward pass costs as much time beside its tokens as this share of a full budget does: weights are
read once more, kernels are started once more."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Sequences that stay together, by index, and the size of the rows that hold them."""

    index: tuple[int, ...]
    rows: int
    width: int


@dataclass(frozen=True, slots=True)
class Micro:
    """Indices of sequences that go through the model together. An `idle` one keeps a rank in step and counts for
    nothing."""

    index: tuple[int, ...]
    idle: bool = False


def plan(units: Sequence[Unit], budget: int, world: int = 1) -> list[list[Micro]]:
    """The microbatches of every rank, equally many for each. Units are sorted by width and cut so that
    padding costs least; a microbatch holds at most `budget` tokens, padding included, or one unit.

    >>> plan([Unit((0, 1), 2, 3), Unit((2, 3), 2, 4)], budget=8)
    [[Micro(index=(0, 1), idle=False), Micro(index=(2, 3), idle=False)]]
    """
    ordered = sorted(units, key=lambda unit: unit.width)
    if not ordered:
        return [[] for _ in range(world)]
    ranks = [_pack(ordered[rank::world], budget) for rank in range(world)]
    most = max(map(len, ranks))
    idle = Micro(ordered[0].index, idle=True)
    return [micros + [idle] * (most - len(micros)) for micros in ranks]


def _pack(units: Sequence[Unit], budget: int) -> list[Micro]:
    """The cheapest cut of units in order of width, by dynamic programming: a microbatch costs its tokens, padding
    included, and as much as `budget / OVERHEAD` tokens for being one."""
    cost, first = [0.0], [0]
    for stop in range(1, len(units) + 1):
        rows, width, best = 0, units[stop - 1].width, (float("inf"), 0)
        for start in range(stop - 1, -1, -1):
            rows += units[start].rows
            if rows * width > budget and start < stop - 1:
                break
            best = min(best, (cost[start] + rows * width + budget / OVERHEAD, start))
        cost.append(best[0])
        first.append(best[1])
    micros, stop = [], len(units)
    while stop:
        micros.append(Micro(tuple(i for unit in units[first[stop] : stop] for i in unit.index)))
        stop = first[stop]
    return micros[::-1]
