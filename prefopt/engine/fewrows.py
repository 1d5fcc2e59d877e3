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

LEAST = 1 << 16
"""Numbers in a matrix that is worth packing."""


class FewRows(TorchFunctionMode):
    """Within it, linear layers are computed from packed matrices and the attention of single tokens as whole products,
    both in float32: the same numbers up to rounding. The parameters of the model must not change while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.packed: dict[int, Tensor] = {}

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
        if func is scaled_dot_product_attention and _single(*args, **named):
            return _attention(*args, **named)
        return func(*args, **named)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input.shape[:-1].numel()
        lasts = isinstance(weight, nn.Parameter) and weight.numel() >= LEAST
        if not lasts or rows > self.rows or {input.dtype, weight.dtype} != {torch.float32}:
            return linear(input, weight, bias)
        if id(weight) not in self.packed:
            self.packed[id(weight)] = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), self.rows)
        states = input.reshape(rows, -1)
        filled = states if rows == self.rows else pad(states, (0, 0, 0, self.rows - rows))
        product = torch.ops.mkl._mkl_linear(filled, self.packed[id(weight)], weight.detach(), bias, self.rows)
        return product[:rows].view(*input.shape[:-1], -1)  # type: ignore[no-any-return]


def _single(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether each row has one query, in float32, under one mask of bits for all heads."""
    if attn_mask is None or attn_mask.dtype != torch.bool or attn_mask.shape[1:3] != (1, 1) or dropout_p:
        return False
    return query.dim() == 4 and query.shape[2] == 1 and query.dtype == torch.float32


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Queries [n, H, 1, D], keys and values [n, K, T, D]: heads that share keys are rows of one product."""
    n, heads, _, width = query.shape
    q = query.reshape(n, key.shape[1], heads // key.shape[1], width) * (width**-0.5 if scale is None else scale)
    weights = torch.matmul(q, key.transpose(2, 3)).masked_fill_(~attn_mask, torch.finfo(torch.float32).min)
    return torch.matmul(weights.softmax(-1), value).reshape(n, heads, 1, value.shape[3])


def few_rows(device: torch.device, dtype: torch.dtype) -> Callable[[int], AbstractContextManager[Any]]:
    """What makes the mode for so many rows, where it is faster; else of nothing."""
    known = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")  # type: ignore[no-untyped-call]
    return FewRows().of if known and device.type == "cpu" and dtype == torch.float32 else lambda rows: nullcontext()
