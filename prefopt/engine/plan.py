"""Cuts a minibatch into microbatches. Knows lengths and groups only; the losses are normalised so that any cut is
exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Micro:
    """Indices of sequences that go through the model together. An `idle` one keeps a rank in step and counts for
    nothing."""

    index: tuple[int, ...]
    idle: bool = False


def plan(lengths: Sequence[int], groups: Sequence[int], budget: int, world: int = 1) -> list[list[Micro]]:
    """The microbatches of every rank, equally many for each. Groups stay whole and are sorted by length; a microbatch
    holds at most `budget` tokens, padding included, or one group.

    >>> plan([3, 3, 4, 4], [0, 0, 1, 1], budget=8)
    [[Micro(index=(0, 1), idle=False), Micro(index=(2, 3), idle=False)]]
    """
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    whole = sorted(members.values(), key=lambda index: max(lengths[i] for i in index))
    if not whole:
        return [[] for _ in range(world)]
    ranks = [_pack(whole[rank::world], lengths, budget) for rank in range(world)]
    most = max(map(len, ranks))
    idle = Micro(tuple(whole[0]), idle=True)
    return [micros + [idle] * (most - len(micros)) for micros in ranks]


def _pack(groups: Sequence[list[int]], lengths: Sequence[int], budget: int) -> list[Micro]:
    micros: list[Micro] = []
    current: list[int] = []
    for group in groups:
        longest = max(lengths[i] for i in (*current, *group))
        if current and longest * (len(current) + len(group)) > budget:
            micros.append(Micro(tuple(current)))
            current = []
        current = current + group
    return [*micros, Micro(tuple(current))] if current else micros
