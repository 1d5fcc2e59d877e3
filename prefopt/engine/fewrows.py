"""A model's steps by one token a row, on a CPU: products of few rows with large matrices, and attention of one query.
Knows linear layers and attention; no model.

MKL packs a matrix before it multiplies. With few rows that is most of the time of a product: here each matrix is packed
once, for as long as rows are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from prefopt.engine.shortrows import Asked

LEAST = 1 << 16
"""Numbers in a matrix that is worth packing."""


class FewRows(TorchFunctionMode):
    """Within it, linear layers are computed from packed matrices and the attention of single tokens as whole products,
    both in float32: the same numbers up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.packed: dict[int, tuple[Tensor, int, Tensor]] = {}
        """Each matrix, its version, and itself packed."""

    def of(self, rows: int) -> FewRows:
        """Itself, for products of so many rows. Matrices are packed for a number of rows, and fewer are filled up: they
        are packed again when half of them are left."""
        if not self.rows / 2 < rows <= self.rows:
            self.rows, self.packed = rows, {}
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is linear:
            return self._linear(*args, **named)
        if func is scaled_dot_product_attention and _single(asked := Asked(*args, **named)):
            return _attention(asked)
        return func(*args, **named)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input.shape[:-1].numel()
        lasts = isinstance(weight, nn.Parameter) and weight.numel() >= LEAST
        if not lasts or rows > self.rows or {input.dtype, weight.dtype} != {torch.float32}:
            return linear(input, weight, bias)
        states = input.reshape(rows, -1)
        filled = states if rows == self.rows else pad(states, (0, 0, 0, self.rows - rows))
        product = torch.ops.mkl._mkl_linear(filled, self._packed(weight), weight.detach(), bias, self.rows)
        return product[:rows].view(*input.shape[:-1], -1)  # type: ignore[no-any-return]

    def _packed(self, weight: Tensor) -> Tensor:
        """Packed again when it has changed."""
        known, version, packed = self.packed.get(id(weight), (None, 0, weight))
        if known is not weight or version != weight._version:
            packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), self.rows)
            self.packed[id(weight)] = weight, weight._version, packed
        return packed


def _single(asked: Asked) -> bool:
    """Whether one mask of bits holds for all queries of a row: there is one, or those of heads that share keys."""
    mask = asked.attn_mask
    masked = mask is not None and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)
    return asked.plain and masked and asked.query.shape[2] * asked.query.shape[1] % asked.key.shape[1] == 0


def _attention(asked: Asked) -> Tensor:
    """Heads that share keys are rows of one product."""
    assert asked.attn_mask is not None
    n, heads, queries, width = asked.query.shape
    q = asked.query.reshape(n, asked.key.shape[1], -1, width) * asked.factor
    scores = torch.matmul(q, asked.key.transpose(2, 3)).masked_fill_(~asked.attn_mask, torch.finfo(torch.float32).min)
    return torch.matmul(scores.softmax(-1), asked.value).reshape(n, heads, queries, -1)


def few_rows(device: torch.device, dtype: torch.dtype) -> Callable[[int], AbstractContextManager[Any]]:
    """What makes the mode for so many rows, where it is faster; else of nothing."""
    known = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")  # type: ignore[no-untyped-call]
    return FewRows().of if known and device.type == "cpu" and dtype == torch.float32 else lambda rows: nullcontext()
