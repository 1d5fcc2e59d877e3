"""Which rows read which pages of prompts, as indices. Knows numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 32
"""Tokens of a prompt that stand together."""
SKEW = 4
"""A page with more rows than so many times their mean number, rounded up, is read again for the rest."""
TOGETHER = 16
"""The most rows of a group."""
Pairs = list[list[tuple[int, int]]]


class Sharing:
    """The pages of rows, with PAGE tokens of its prompt each, none for a row without a prompt; and what is found out
    about them, once."""

    def __init__(self, rows: Sequence[tuple[int, ...]]) -> None:
        self.rows = rows
        self.longest = PAGE * max(map(len, rows))
        """Tokens on the pages of the row that has most."""
        self.end = 1 + max(chain(*rows), default=-1)
        """Pages from here on are nobody's."""
        self.known: dict[int, Orders] = {}

    def orders(self, heads: int) -> Orders:
        """For that many heads with keys."""
        if heads not in self.known:
            self.known[heads] = Orders.of(self.rows, heads)
        return self.known[heads]

    @cached_property
    def groups(self) -> Groups:
        return Groups.of(self.rows)


class Groups(NamedTuple):
    """Rows with the same pages, up to TOGETHER: what each group has, one after the other, and where it begins, with the
    end of the last; in int32."""

    rows: Tensor
    row_starts: Tensor
    pages: Tensor
    page_starts: Tensor

    @classmethod
    def of(cls, pages: Sequence[tuple[int, ...]]) -> Groups:
        """For rows with these pages."""
        same: dict[tuple[int, ...], list[int]] = {}
        for row, own in enumerate(pages):
            same.setdefault(own, []).append(row)
        cuts = [(own, rows[i : i + TOGETHER]) for own, rows in same.items() for i in range(0, len(rows), TOGETHER)]
        return cls(*_joined([rows for _, rows in cuts]), *_joined([own for own, _ in cuts]))


def _joined(lists: Sequence[Sequence[int]]) -> Iterable[Tensor]:
    """One after the other, and where each begins, with the end of the last."""
    for numbers in (chain(*lists), accumulate(map(len, lists), initial=0)):
        yield torch.tensor([*numbers], dtype=torch.int32)


class Orders(NamedTuple):
    """Where things of rows, with heads [K], stand among those of readings, and the other way round. A reading is one of
    a page for rows that have it; each takes as many rows as any does, of which some are there to fill it."""

    pages: Tensor | None
    """The page of each reading; None where each is read once, in their order."""
    rows: Tensor
    """For each reading, head and row of the reading: the row's head, among [n, K]."""
    weights: Tensor
    """For the same: the page of the row's head, among [n, K, most]."""
    back: Tensor
    """For each of `most` pages of each row's head: where it is among those of readings. The first one stands for those
    that the row does not have, and any for a row without pages."""
    without: Tensor | None
    """The rows without pages; None where there are none."""
    own: Tensor
    """The same, for those that it has."""
    starts: Tensor
    """Where in `own` each row's head begins."""

    @classmethod
    def of(cls, pages: Sequence[Sequence[int]], heads: int) -> Orders:
        """For rows with these pages."""
        numbers, here, there = _readings(pages)
        size, most = max(map(len, here)), max(map(len, pages))
        row, which = torch.tensor([_filled(pairs, size) for pairs in here])[:, None].unbind(-1)
        reading, place = torch.tensor([_filled(pairs, most) for pairs in there])[:, None].unbind(-1)
        each, sizes = torch.arange(heads)[:, None], torch.tensor(list(map(len, pages)))
        rows, back = row * heads + each, (reading * heads + each) * size + place
        has = (torch.arange(most) < sizes[:, None])[:, None].expand(-1, heads, -1)
        ends = sizes.repeat_interleave(heads).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        again = None if numbers == list(range(len(numbers))) else torch.tensor(numbers)
        without = None if sizes.all() else (sizes == 0).nonzero().flatten()
        return cls(again, rows.flatten(), (rows * most + which).flatten(), back.flatten(), without, back[has], starts)


def _readings(pages: Sequence[Sequence[int]]) -> tuple[list[int], Pairs, Pairs]:
    """The page of each reading; the rows of each, with which of their pages it is; and the reading of each page of each
    row, with which of its rows that is.

    >>> _readings([(0,), (0, 2)])
    ([0, 1, 2], [[(0, 0), (1, 0)], [], [(1, 1)]], [[(0, 0)], [(0, 1), (2, 0)]])
    """
    rows = Counter(chain(*pages))
    limit = SKEW * -(-rows.total() // len(rows))
    numbers = list(range(1 + max(rows))) if max(rows.values()) <= limit else sorted(rows)
    last = {page: i for i, page in enumerate(numbers)}
    here: Pairs = [[] for _ in numbers]
    there: Pairs = []
    for row, own in enumerate(pages):
        there.append([])
        for which, page in enumerate(own):
            if len(here[last[page]]) == limit:
                last[page] = len(here)
                here.append([])
                numbers.append(page)
            there[row].append((last[page], len(here[last[page]])))
            here[last[page]].append((row, which))
    return numbers, here, there


def _filled(pairs: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    first = pairs[0] if pairs else (0, 0)
    return pairs + [first] * (size - len(pairs))
