"""Attention over rows of a beginning and the branches that grow from it, on a CPU. Knows queries, keys, values and
where branches stand; no model.

A kernel with a mask visits every pair of places. Here only those are that may see each other: the beginning by all, and
each branch by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORTH = 0.5
"""The share of all pairs of places, up to which this is faster."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A row: its first `start` tokens see what stands before them, those of a branch the beginning and what stands
    before them in their branch. Each branch ends where the next begins, at one of `stops`; the last is the row's end.
    A row may have none."""

    start: int
    stops: tuple[int, ...]

    @classmethod
    def of(cls, visible: Tensor) -> Tree | None:
        """The tree that a mask [T, T] describes, true where a token may look; None where it is another mask."""
        tokens = len(visible)
        first = visible.flip(0).to(torch.uint8).argmax(0)  # who is the first to see a token, from the end
        start, *turns = [*(first.diff() != 0).nonzero().squeeze(1).add(1).tolist(), tokens]
        found = cls(start, tuple(turns) or (tokens,))
        return found if torch.equal(found.mask, visible) else None

    @property
    def branches(self) -> list[slice]:
        return [slice(*both) for both in pairwise((self.start, *self.stops))]

    @property
    def longest(self) -> int:
        """Tokens of the longest branch."""
        return max(stop - start for start, stop in pairwise((self.start, *self.stops)))

    @property
    def mask(self) -> Tensor:
        """[T, T], true where a token may look."""
        found = torch.zeros(self.stops[-1], self.stops[-1], dtype=torch.bool)
        found[:, : self.start] = True
        for branch in self.branches:
            found[branch, branch] = True
        return found.tril_()

    @property
    def weights(self) -> int:
        """Pairs of places that are visited."""
        return self.start * self.start + (self.stops[-1] - self.start) * (self.start + self.longest)


def trees(mask: Tensor) -> tuple[Tree, ...]:
    """Those of the rows of a mask [R, 1, T, T]; none where a row is no tree, or visiting every pair is as fast."""
    found = [tree for row in mask[:, 0] if (tree := Tree.of(row)) is not None]
    every = mask.numel()
    return tuple(found) if len(found) == len(mask) and sum(t.weights for t in found) <= WORTH * every else ()


def branched(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Tree], scale: float) -> Tensor:
    """Attention of queries [R, H, T, D] over keys and values [R, K, T, D], K divides H; [R, H, T, D]."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    each = [_Attention.apply(q, k, v, tree, scale) for q, k, v, tree in zip(query, key, value, rows, strict=True)]  # type: ignore[no-untyped-call]
    return torch.stack(each)


class _Attention(torch.autograd.Function):
    """That of one row, [H, T, D] each. A token of a branch has weights for the beginning first, then for its branch."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float) -> Tensor:
        start, out = tree.start, torch.empty_like(value)
        common = torch.softmax(_scores(query[:, :start], key[:, :start], scale), -1)
        below = query.new_full((len(query), query.shape[1] - start, start + tree.longest), -torch.inf)
        below[:, :, :start] = _products(query[:, start:], key[:, :start], scale)
        for branch in tree.branches:
            _own(below, tree, branch).copy_(_scores(query[:, branch], key[:, branch], scale))
        torch.ops.aten._softmax.out(below, -1, False, out=below)
        out[:, :start] = torch.bmm(common, value[:, :start])
        out[:, start:] = torch.bmm(below[:, :, :start], value[:, :start])
        for branch in tree.branches:
            out[:, branch] += torch.bmm(_own(below, tree, branch), value[:, branch])
        ctx.save_for_backward(query, key, value, common, below)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, common, below = ctx.saved_tensors
        tree, start, scale = ctx.tree, ctx.tree.start, ctx.scale
        by_common = _slopes(torch.bmm(grad[:, :start], value[:, :start].transpose(1, 2)), common, scale)
        by_below = torch.zeros_like(below)
        by_below[:, :, :start] = torch.bmm(grad[:, start:], value[:, :start].transpose(1, 2))
        for branch in tree.branches:
            _own(by_below, tree, branch).copy_(torch.bmm(grad[:, branch], value[:, branch].transpose(1, 2)))
        by_below = _slopes(by_below, below, scale)
        slopes = by_query, by_key, by_value = [torch.empty_like(x) for x in (query, key, value)]
        above, first, rest = by_below[:, :, :start], slice(0, start), slice(start, None)
        by_query[:, first], by_query[:, rest] = torch.bmm(by_common, key[:, first]), torch.bmm(above, key[:, first])
        by_key[:, first] = _sum(by_common, query[:, first], above, query[:, rest])
        by_value[:, first] = _sum(common, grad[:, first], below[:, :, :start], grad[:, rest])
        for branch in tree.branches:
            own, weights = _own(by_below, tree, branch), _own(below, tree, branch)
            by_query[:, branch] += torch.bmm(own, key[:, branch])
            by_key[:, branch] = torch.bmm(own.transpose(1, 2), query[:, branch])
            by_value[:, branch] = torch.bmm(weights.transpose(1, 2), grad[:, branch])
        return (*slopes, None, None)


def _own(weights: Tensor, tree: Tree, branch: slice) -> Tensor:
    """The part of [H, T - start, start + longest] that is a branch's for itself."""
    size = branch.stop - branch.start
    return weights[:, branch.start - tree.start : branch.stop - tree.start, tree.start : tree.start + size]


def _products(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=scale)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Of tokens that see themselves and what stands before them."""
    found = _products(query, key, scale)
    later = torch.ones(found.shape[-2:], dtype=torch.bool).triu_(1)
    return found.masked_fill_(later, -torch.inf)


def _slopes(by_weights: Tensor, weights: Tensor, scale: float) -> Tensor:
    """By scores, before they are scaled."""
    torch.ops.aten._softmax_backward_data.out(by_weights, weights, -1, weights.dtype, grad_input=by_weights)
    return by_weights.mul_(scale)


def _sum(one: Tensor, by_one: Tensor, other: Tensor, by_other: Tensor) -> Tensor:
    return torch.bmm(one.transpose(1, 2), by_one).baddbmm_(other.transpose(1, 2), by_other)
