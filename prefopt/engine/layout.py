"""From sequences to the tensors of one forward pass. Knows tokens and groups only; any layout gives the same numbers.

`padded`: one row for each sequence, padding masked: the plain path. `causal`: the same without a mask, for padding on
the right cannot reach what stands before it. `shared`: one row for each group, its common beginning once and the rest
of each sequence behind it, under a mask that lets a branch see the beginning and itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, takewhile
from typing import Literal

import torch
from torch import Tensor

from prefopt.data.render import Tokens
from prefopt.engine.linear import KEEP_BYTES
from prefopt.engine.plan import Unit

Layout = Literal["padded", "causal", "shared"]
BEGINNING, PADDING = 0, -1


@dataclass(frozen=True, slots=True)
class Paths:
    """How a forward pass is computed; every choice gives the same numbers.

    `layout` of the rows; `tiled`: the head without whole logits, holding at most `keep_bytes`; `reach`: the row length
    at which attention costs as much as the matrix products, which says when sharing a beginning pays; `spared`: modules
    of the last layer that are spared the tokens nobody looks at.
    """

    layout: Layout = "padded"
    tiled: bool = False
    keep_bytes: int = KEEP_BYTES
    reach: float = 1e6
    spared: tuple[str, ...] = ()

    def apart(self) -> Paths:
        """The same with a row for each sequence."""
        return replace(self, layout="causal") if self.layout == "shared" else self


PLAIN = Paths()


@dataclass(frozen=True, slots=True)
class Row:
    """Sequences of one group in one row: what they share, then the rest of each. One alone is all beginning."""

    index: tuple[int, ...]
    beginning: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        return len(self.beginning) + sum(map(len, self.branches))


def group_rows(index: Sequence[int], tokens: Sequence[Tokens], paths: Paths) -> list[Row]:
    """The rows that hold the sequences of one group: one where sharing is allowed and costs less than one for each."""
    whole = [tokens[i].prompt + tokens[i].completion for i in index]
    apart = [Row((i,), ids, ()) for i, ids in zip(index, whole, strict=True)]
    if paths.layout != "shared" or len(whole) == 1:
        return apart
    same = takewhile(lambda column: len(set(column)) == 1, zip(*whole, strict=False))
    common = min(sum(1 for _ in same), min(map(len, whole)) - 1)
    together = Row(tuple(index), whole[0][:common], tuple(ids[common:] for ids in whole))
    cost = together.width * (paths.reach + 2 * together.width)  # a mask visits every pair of places, causal ones half
    return [together] if cost < sum(row.width * (paths.reach + row.width) for row in apart) else apart


def members(groups: Sequence[int]) -> list[list[int]]:
    """The places of each group, in the order in which groups first appear.

    >>> members([7, 7, 3, 7])
    [[0, 1, 3], [2]]
    """
    found: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return list(found.values())


def units(tokens: Sequence[Tokens], groups: Sequence[int], paths: Paths) -> list[Unit]:
    """What a plan is made of: each group, and the rows it takes."""
    laid = [group_rows(index, tokens, paths) for index in members(groups)]
    return [
        Unit(tuple(i for row in rows for i in row.index), len(rows), max(row.width for row in rows)) for rows in laid
    ]


@dataclass(frozen=True, slots=True)
class Packed:
    """One forward pass of R rows, W wide, over n sequences with S completion tokens, at most T in one.

    `ids` [R, W]; `attention` [R, W] where padding is masked; `positions`, `branch` [R, W] where rows are shared. For
    each completion token: `source` [S] the flat place of the state that predicts it, `target` [S] its id, `place` [S]
    where it belongs in a flat [n, T]. `last` [n] is the flat place of each sequence's last token, `sequences` those of
    all its tokens, on the CPU.
    """

    ids: Tensor
    attention: Tensor | None
    positions: Tensor | None
    branch: Tensor | None
    source: Tensor
    target: Tensor
    place: Tensor
    last: Tensor
    steps: int
    sequences: tuple[Tensor, ...]

    @classmethod
    def of(cls, tokens: Sequence[Tokens], groups: Sequence[int], paths: Paths) -> Packed:
        """On the CPU."""
        rows = [row for index in members(groups) for row in group_rows(index, tokens, paths)]
        width = max(row.width for row in rows)
        steps = max(len(t.completion) for t in tokens)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.arange(width).repeat(len(rows), 1)
        branch = torch.full((len(rows), width), PADDING)
        places: dict[int, Tensor] = {}
        for r, row in enumerate(rows):
            ids[r, : row.width] = torch.tensor([*row.beginning, *chain(*row.branches)])
            for i, (k, span) in zip(row.index, _spans(row), strict=True):
                start, stop = len(row.beginning), len(row.beginning) + span.stop - span.start
                branch[r, :start], branch[r, span] = BEGINNING, k
                positions[r, span] = torch.arange(start, stop)
                places[i] = r * width + torch.cat([torch.arange(start), torch.arange(span.start, span.stop)])
        forked = any(row.branches for row in rows)
        return cls(
            ids=ids,
            attention=(branch != PADDING).long() if paths.layout == "padded" else None,
            positions=positions if forked else None,
            branch=branch if forked else None,
            source=torch.cat([places[i][len(t.prompt) - 1 : -1] for i, t in enumerate(tokens)]),
            target=torch.tensor([i for t in tokens for i in t.completion]),
            place=torch.cat([i * steps + torch.arange(len(t.completion)) for i, t in enumerate(tokens)]),
            last=torch.stack([places[i][-1] for i in range(len(tokens))]),
            steps=steps,
            sequences=tuple(places[i] for i in range(len(tokens))),
        )

    def to(self, device: torch.device) -> Packed:
        """The same on `device`."""
        tensors = {f.name: x.to(device) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def unpacked(self, values: Tensor) -> Tensor:
        """Values of the completion tokens, [S] -> [n, T], with 0 past each completion."""
        grid = values.new_zeros(len(self.last) * self.steps)
        return grid.index_put((self.place,), values).view(len(self.last), self.steps)


def _spans(row: Row) -> Iterator[tuple[int, slice]]:
    """Number and place of each sequence's own tokens in its row."""
    if not row.branches:
        yield BEGINNING, slice(len(row.beginning), len(row.beginning))
    stop = len(row.beginning)
    for k, own in enumerate(row.branches, 1):
        start, stop = stop, stop + len(own)
        yield k, slice(start, stop)


def tree_mask(branch: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """Which token a token may see: the beginning and its own branch, not what comes later, nothing `window` or more
    positions back. `branch`, `positions` [R, W] -> [R, 1, W, W], true where it may.

    >>> tree_mask(torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 1, 2, 2]]))[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 0, 1]], dtype=torch.int32)
    """
    order = torch.arange(branch.shape[1], device=branch.device)
    seen = (branch[:, :, None] == branch[:, None, :]) | (branch == BEGINNING)[:, None, :]
    seen &= order[:, None] >= order
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    return seen[:, None]
