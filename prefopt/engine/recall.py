"""What drawing has computed, looked up in place of computed again: as long as the weights are those that drew, the
products of a layer with the tokens of a sample are known. Knows linear layers, tokens and places; no architecture.

A pass that finds its sequences here computes norms, attention and whatever is no large matrix, and derives as always:
of three products with each matrix, forward and by both of its operands, two are left. Each time it is seen to that a
layer is given what it was given when the product was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from prefopt.engine.fewrows import marks
from prefopt.engine.layout import Packed

ROOT = -1
"""The place before the first token of a sequence; and no place at all."""
NEAR = 1e-3
"""How far apart, in units of their size, marks of the same input may be."""


class Recall:
    """Products of the linear layers of one network with tokens, each token known by those before it. At most `budget`
    bytes are kept; where they do not suffice for a step nothing is, and `warn` hears of it once."""

    def __init__(self, budget: float, warn: Callable[[str], None]) -> None:
        self.budget, self.warn, self.warned = budget, warn, False
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.size = self.bytes = 0
        self.short = False
        """Whether there was too much to keep."""
        self.next: dict[tuple[int, int], int] = {}
        """The place of a token behind a place."""
        self.kept: dict[int, Kept] = {}
        """By matrix."""
        self.first = ROOT
        """The first place of the pass that is heard."""
        self.real: Tensor | None = None
        """Which of its tokens are no padding; None for all."""
        self.late = False
        """Whether a pass came after something was looked up."""
        self.passes: list[Known | None] = []
        """Those that were asked for."""

    # --- while tokens are drawn -------------------------------------------------------------------------------------

    @contextmanager
    def hearing(self, tokens: int, real: Tensor | None = None) -> Iterator[int]:
        """Within it, the products of one pass over so many tokens are `heard`, those that are `real` of what it is
        given. Yields the place of the first."""
        self.first, self.real = self.size, real
        self.size += tokens
        self.late |= any(kept.joined is not None for kept in self.kept.values())
        try:
            yield self.first
        finally:
            self.first = ROOT

    def heard(self, matrix: Tensor, marked: Tensor, product: Tensor) -> None:
        """`product` [..., out] of a pass with `matrix`, and the marks [...] of what it was given. Products with other
        tokens than those of the pass are not kept."""
        tokens = self.size - self.first if self.real is None else len(self.real)
        rows = product.detach().flatten(0, -2)
        if self.first == ROOT or self.short or len(rows) != tokens:
            return
        marked = marked.flatten()
        if self.real is not None:
            rows, marked = rows[self.real], marked[self.real]
        self.bytes += rows.nbytes
        if self.bytes > self.budget:
            self._give_up()
        else:
            self.kept.setdefault(id(matrix), Kept(matrix)).passes.append(Pass(self.first, marked, rows, rows._version))

    def _give_up(self) -> None:
        self.short, self.kept = True, {}
        if not self.warned:
            self.warned = True
            self.warn(f"nothing of the draws is reused: a step takes more than rollout.reuse_bytes, {self.budget:,}")

    def follow(self, place: int, token: int, fresh: int) -> int:
        """The place of a token behind another: the one it has, or a fresh one."""
        return self.next.setdefault((place, token), fresh)

    # --- while they are scored --------------------------------------------------------------------------------------

    def of(self, packed: Packed) -> Known | None:
        """What is known of the tokens of a pass; None where one of them was not drawn, but for the last of each
        sequence, which nothing follows."""
        self.passes.append(self._known(packed))
        return self.passes[-1]

    @property
    def share(self) -> float:
        """Of the products in the passes it was asked for those that it knew."""
        return sum(0.0 if known is None else known.share for known in self.passes) / max(1, len(self.passes))

    def _known(self, packed: Packed) -> Known | None:
        if not self.kept or self.late or any(kept.stale for kept in self.kept.values()):
            return None
        found = torch.full((packed.ids.numel(),), ROOT)
        ids = packed.ids.flatten()
        for places in packed.sequences:
            known = self._places(ids[places].tolist())
            if len(known) < len(places) - 1:
                return None
            found[places[: len(known)]] = torch.tensor(known, dtype=torch.long)
        return Known(self.kept, found, packed.source, self.size)

    def _places(self, tokens: List[int]) -> list[int]:
        """Of the tokens from the first on, as far as they are known."""
        place, found = ROOT, []
        for token in tokens:
            place = self.next.get((place, token), ROOT)
            if place == ROOT:
                break
            found.append(place)
        return found


class Pass(NamedTuple):
    """Products of one pass with a matrix, `rows` [k, out], and the marks of what they were computed from."""

    first: int
    marked: Tensor
    rows: Tensor
    version: int


class Joined(NamedTuple):
    """All products with a matrix, and one of zeros, [k + 1, out]; their marks, no number for the last, [k + 1]; and
    which of them is that of each place, [size + 1]: the last stands for none."""

    rows: Tensor
    marked: Tensor
    where: Tensor


class Kept:
    """Products with one matrix, pass by pass, then in one piece."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.version = matrix, matrix._version
        self.passes: list[Pass] = []
        self.joined: Joined | None = None

    @property
    def stale(self) -> bool:
        """Whether the matrix has changed."""
        return bool(self.matrix._version != self.version)

    @property
    def sound(self) -> bool:
        """Whether nobody has written into the products since they were computed."""
        return all(one.rows._version == one.version for one in self.passes)

    def whole(self, size: int) -> Joined:
        """In one piece, `size` the number of places."""
        if self.joined is None:
            sizes = [len(one.rows) for one in self.passes]
            where = _where(tuple((one.first, len(one.rows)) for one in self.passes), size)
            none = torch.full((1,), torch.nan)
            marked = torch.cat([*(one.marked for one in self.passes), none])
            rows = self.passes[0].rows.new_empty(sum(sizes) + 1, self.passes[0].rows.shape[1])
            rows[-1] = 0
            for part in torch.split(rows[:-1], sizes):
                part.copy_(self.passes.pop(0).rows)  # whose memory is given back
            self.joined = Joined(rows, marked, where)
        return self.joined

    def at(self, places: Tensor, given: Tensor, size: int) -> Tensor | None:
        """Which products are those of the tokens at these places, given this; None unless all are known. No place gets
        zeros."""
        if not self.sound:
            return None
        whole = self.whole(size)
        at = whole.where[places]
        then, now = whole.marked[at], marks(given.detach()).flatten()
        same = (then - now).abs() <= NEAR * then.abs().nanmean()
        return at if bool((same | (places == ROOT)).all()) else None


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
        self.asked = self.found = 0

    @property
    def share(self) -> float:
        """Of the products that might have been known those that were."""
        return self.found / max(1, self.asked)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is linear and not kwargs and len(args) in (2, 3) and id(args[1]) in self.kept:
            at = self._at(args[1], args[0], self.places.get(args[0].shape[:-1].numel()))
            if at is not None:
                return _Looked.apply(*args[:2], args[2] if len(args) > 2 else None, self._rows(args[1]), at)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))

    def predicted(self, matrix: Tensor, states: Tensor) -> Callable[[slice], Tensor] | None:
        """The products of the vocabulary's matrix with the states that predict a token, [S, H]; None if one is not
        known."""
        at = self._at(matrix, states, self.source) if id(matrix) in self.kept else None
        return None if at is None else lambda part: self._rows(matrix).index_select(0, at[part])

    def _at(self, matrix: Tensor, given: Tensor, places: Tensor | None) -> Tensor | None:
        at = None if places is None else self.kept[id(matrix)].at(places, given, self.size)
        self.asked += 1
        self.found += at is not None
        return at

    def _rows(self, matrix: Tensor) -> Tensor:
        return self.kept[id(matrix)].whole(self.size).rows


class _Looked(torch.autograd.Function):
    """A product that was looked up, derived from as `linear` is."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, matrix: Tensor, bias: Tensor | None, rows: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(given, matrix)
        found = rows.new_empty(*given.shape[:-1], rows.shape[1])
        torch.index_select(rows, 0, at, out=found.view(len(at), -1))
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
            None,
        )


def recalled(recall: Recall | None, packed: Packed) -> AbstractContextManager[Known | None]:
    """What is known of the tokens of a pass, in force within it."""
    known = None if recall is None else recall.of(packed)
    return nullcontext() if known is None else known
