"""Cuts a minibatch into microbatches. Knows the sizes of units only; the losses are normalised so that any cut is
exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
    """The microbatches of every rank, equally many for each. Units are sorted by width; a microbatch holds at most
    `budget` tokens, padding included, or one unit.

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
    """Units in order of width, so that the last of a microbatch is its widest."""
    micros: list[list[Unit]] = []
    for unit in units:
        if micros and unit.width * (sum(u.rows for u in micros[-1]) + unit.rows) <= budget:
            micros[-1].append(unit)
        else:
            micros.append([unit])
    return [Micro(tuple(i for unit in micro for i in unit.index)) for micro in micros]
