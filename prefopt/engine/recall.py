"""What drawing has computed, looked up in place of computed again: as long as the weights are those that drew, the
products of a layer with the tokens of a sample are known. Knows linear layers, tokens and places; no architecture.

A pass that finds all its sequences here computes norms, attention and whatever is no large matrix, and derives as
always: of three products with each matrix, forward and by both of its operands, two are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from prefopt.engine.layout import Packed

ROOT = -1
"""The place before the first token of a sequence; and no place at all."""


class Recall:
    """Products of the linear layers of one network with tokens, each token known by those before it. At most `budget`
    bytes are kept; where they do not suffice nothing is, and `warn` hears of it once."""

    def __init__(self, budget: int, warn: Callable[[str], None]) -> None:
        self.budget, self.warn = budget, warn
        self.short = False
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.size = self.bytes = self.asked = self.found = 0
        self.next: dict[tuple[int, int], int] = {}
        """The place of a token behind a place."""
        self.kept: dict[int, Kept] = {}
        """By matrix."""
        self.first = ROOT
        """The first place of the pass that is heard."""
        self.real: Tensor | None = None
        """Which of its tokens are no padding; None for all."""

    # --- while tokens are drawn -------------------------------------------------------------------------------------

    @contextmanager
    def hearing(self, tokens: int, real: Tensor | None = None) -> Iterator[int]:
        """Within it, the products of one pass over so many tokens are `heard`. Yields the place of the first."""
        self.first, self.real = self.size, real
        self.size += tokens
        try:
            yield self.first
        finally:
            self.first = ROOT

    def heard(self, matrix: Tensor, product: Tensor) -> None:
        """`product` [..., out] of a pass with `matrix`."""
        if self.first == ROOT or self.short:
            return
        rows = product.detach().flatten(0, -2)
        rows = rows if self.real is None else rows[self.real]
        self.bytes += rows.nbytes
        if self.bytes > self.budget:
            self.short = True
            self.clear()
            self.warn(f"nothing of the draws is reused: a step takes more than rollout.reuse_bytes, {self.budget:,}")
        elif len(rows) == self.size - self.first:
            self.kept.setdefault(id(matrix), Kept(matrix)).add(self.first, rows)

    def follow(self, place: int, token: int, fresh: int) -> int:
        """The place of a token behind another: the one it has, or a fresh one."""
        return self.next.setdefault((place, token), fresh)

    # --- while they are scored --------------------------------------------------------------------------------------

    def of(self, packed: Packed) -> Known | None:
        """What is known of the tokens of a pass; None where one of them was not drawn, but for the last of each
        sequence, which nothing follows."""
        known = self._known(packed)
        self.asked += packed.ids.numel()
        self.found += 0 if known is None else packed.ids.numel()
        return known

    def _known(self, packed: Packed) -> Known | None:
        if not self.kept or any(kept.stale for kept in self.kept.values()):
            return None
        found = torch.full((packed.ids.numel(),), ROOT)
        ids = packed.ids.flatten()
        for places in packed.sequences:
            known = self._places(ids[places].tolist())
            if len(known) < len(places) - 1:
                return None
            found[places[: len(known)]] = torch.tensor(known, dtype=torch.long)
        return Known(self.kept, found, packed.source, self.size)

    @property
    def share(self) -> float:
        """Of the tokens it was asked for those whose products it knew."""
        return self.found / self.asked if self.asked else 0.0

    def _places(self, tokens: List[int]) -> list[int]:
        """Of the tokens from the first on, as far as they are known."""
        place, found = ROOT, []
        for token in tokens:
            place = self.next.get((place, token), ROOT)
            if place == ROOT:
                break
            found.append(place)
        return found


class Kept:
    """Products with one matrix, pass by pass, then in one piece."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.version = matrix, matrix._version
        self.blocks: list[tuple[int, Tensor]] = []
        self.unfit = False
        """Whether one pass had several products with it, or one came late."""
        self.joined: tuple[Tensor, Tensor] | None = None

    @property
    def stale(self) -> bool:
        """Whether the matrix has changed."""
        return bool(self.matrix._version != self.version)

    def add(self, first: int, rows: Tensor) -> None:
        self.unfit |= self.joined is not None or (bool(self.blocks) and self.blocks[-1][0] == first)
        self.blocks.append((first, rows))

    def whole(self, size: int) -> tuple[Tensor, Tensor]:
        """All products and one of zeros, [k + 1, out], and where among them is that of each place, [size + 1]: the last
        stands for none."""
        if self.joined is None:
            sizes = [len(rows) for _, rows in self.blocks]
            where = _where(tuple((first, len(rows)) for first, rows in self.blocks), size)
            every = self.blocks[0][1].new_empty(sum(sizes) + 1, self.blocks[0][1].shape[1])
            every[-1] = 0
            for part in torch.split(every[:-1], sizes):
                part.copy_(self.blocks.pop(0)[1])  # whose memory is given back
            self.joined = every, where
        return self.joined


@lru_cache(maxsize=4)  # that of most matrices
def _where(spans: tuple[tuple[int, int], ...], size: int) -> Tensor:
    """The number among all rows of each place, [size + 1], for passes that begin at a place and have so many rows; the
    number of rows for a place in none of them.

    >>> _where(((0, 2), (3, 1)), 4)
    tensor([0, 1, 3, 2, 3])
    """
    places = [place for first, count in spans for place in range(first, first + count)]
    where = torch.full((size + 1,), len(places))
    where[torch.tensor(places)] = torch.arange(len(places))
    return where


class Known(TorchFunctionMode):
    """Within it, linear layers that are given the tokens of one pass, or those that are looked at, give products that
    are known already, and are derived from as always."""

    def __init__(self, kept: Mapping[int, Kept], places: Tensor, source: Tensor, size: int) -> None:
        """`places` [R * W] of the pass's tokens; `source` are those that predict one."""
        super().__init__()
        self.kept, self.size, self.source = kept, size, places[source]
        looked_at = places[torch.unique(source)]
        self.places = {len(x): x for x in (looked_at, places)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is linear and not kwargs and len(args) >= 2 and (found := self._found(args[0], args[1])) is not None:
            return _Looked.apply(args[0], args[1], args[2] if len(args) > 2 else None, found)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))

    def _found(self, given: Tensor, matrix: Tensor) -> Tensor | None:
        kept, places = self.kept.get(id(matrix)), self.places.get(given.shape[:-1].numel())
        if kept is None or kept.unfit or places is None:
            return None
        rows, where = kept.whole(self.size)
        at = where[places]
        if bool((at[places != ROOT] == len(rows) - 1).any()):
            return None
        return rows.index_select(0, at).view(*given.shape[:-1], -1)

    def predicted(self, matrix: Tensor) -> Callable[[slice], Tensor] | None:
        """The products with the vocabulary's matrix for the states that predict a token; None if one is not known."""
        kept = self.kept.get(id(matrix))
        if kept is None or kept.unfit:
            return None
        rows, where = kept.whole(self.size)
        at = where[self.source]
        return None if bool((at == len(rows) - 1).any()) else lambda part: rows.index_select(0, at[part])


class _Looked(torch.autograd.Function):
    """A product that was looked up, derived from as `linear` is."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, matrix: Tensor, bias: Tensor | None, found: Tensor) -> Tensor:
        ctx.save_for_backward(given, matrix)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, matrix = ctx.saved_tensors
        flat, wanted = grad.flatten(0, -2), ctx.needs_input_grad
        return (
            (flat @ matrix).view(given.shape) if wanted[0] else None,
            flat.T @ given.flatten(0, -2) if wanted[1] else None,
            flat.sum(0) if wanted[2] else None,
            None,
        )


def recalled(recall: Recall | None, packed: Packed) -> AbstractContextManager[Known | None]:
    """What is known of the tokens of a pass, in force within it."""
    known = None if recall is None else recall.of(packed)
    return nullcontext() if known is None else known
