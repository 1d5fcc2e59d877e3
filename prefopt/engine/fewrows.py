"""Drawing on a CPU: products of few rows with large matrices, and attention of one token a row. Knows linear layers and
attention; no model.

With few rows, most of the time of a product is spent on reading the matrix in an order that suits the processor badly:
here oneDNN packs each matrix once, for as long as rows are drawn. Of rows that share a prompt and stand side by side,
what they share is read once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from prefopt.engine.shortrows import Asked

LEAST = 1 << 16
"""Numbers in a matrix that is worth packing."""
USUAL = 32
"""Rows that it is packed for; it serves any number."""


class Run(NamedTuple):
    """Rows `first` .. `end` - 1, of which the first `shared` keys and values are the same, and which see none from
    `width` on."""

    first: int
    end: int
    shared: int
    width: int


class FewRows(TorchFunctionMode):
    """Within it, linear layers are computed from packed matrices and the attention of single tokens as whole products,
    both in float32: the same numbers up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Sequence[Run] = ()
        self.width = 0
        self.packed: dict[int, tuple[Tensor, int, Tensor]] = {}
        """Each matrix, its version, and itself packed."""

    def of(self, runs: Sequence[Run], width: int) -> FewRows:
        """Itself, for a step of the rows of these runs, with keys and values in `width` places; without runs for
        products alone."""
        self.runs, self.width = runs, width
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is linear:
            return self._linear(*args, **named)
        if func is scaled_dot_product_attention and self._known(asked := Asked(*args, **named)):
            return _attention(asked, self.runs)
        return func(*args, **named)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        lasts = isinstance(weight, nn.Parameter) and weight.numel() >= LEAST
        plain = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (input, weight))
        if not lasts or not plain or torch.is_autocast_enabled("cpu"):
            return linear(input, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(input, self._packed(weight), bias, "none", [], "")  # type: ignore[no-any-return]

    def _packed(self, weight: Tensor) -> Tensor:
        """Packed again when it has changed."""
        known, version, packed = self.packed.get(id(weight), (None, 0, weight))
        if known is not weight or version != weight._version:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), USUAL)
            self.packed[id(weight)] = weight, weight._version, packed
        return packed

    def _known(self, asked: Asked) -> bool:
        """Whether this is the attention of the runs' rows, and one mask of bits holds for all queries of a row: there
        is one, or those of heads that share keys."""
        mask, (n, heads, queries, _) = asked.attn_mask, asked.query.shape
        if not (self.runs and asked.plain and n == self.runs[-1].end and asked.key.shape[2] == self.width):
            return False
        masked = mask is not None and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)
        return masked and queries * heads % asked.key.shape[1] == 0


def _attention(asked: Asked, runs: Sequence[Run]) -> Tensor:
    """Heads that share keys are rows of one product, and so are rows that share a prompt."""
    assert asked.attn_mask is not None
    n, heads, queries, width = asked.query.shape
    query = asked.query.reshape(n, asked.key.shape[1], -1, width) * asked.factor
    scores = query.new_empty(*query.shape[:3], asked.key.shape[2])
    for a, b, shared, to in runs:
        if shared:
            scores[a:b, ..., :shared] = _together(query[a:b], asked.key[a, :, :shared].transpose(1, 2))
        scores[a:b, ..., shared:to] = torch.matmul(query[a:b], asked.key[a:b, :, shared:to].transpose(2, 3))
    weights = scores.masked_fill_(~asked.attn_mask, torch.finfo(torch.float32).min).softmax(-1)
    found = query.new_empty(*query.shape[:3], asked.value.shape[3])
    for a, b, shared, to in runs:
        found[a:b] = torch.matmul(weights[a:b, ..., shared:to], asked.value[a:b, :, shared:to])
        if shared:
            found[a:b] += _together(weights[a:b, ..., :shared], asked.value[a, :, :shared])
    return found.view(n, heads, queries, -1)


def _together(rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows [n, K, g, D] times the K matrices [K, D, E] that all n share, [n, K, g, E]."""
    n, heads, queries, width = rows.shape
    product = torch.bmm(rows.transpose(0, 1).reshape(heads, n * queries, width), matrices)
    return product.view(heads, n, queries, -1).transpose(0, 1)


def few_rows(device: torch.device, dtype: torch.dtype) -> FewRows | None:
    """The mode, where it is faster."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return FewRows() if known and device.type == "cpu" and dtype == torch.float32 else None
