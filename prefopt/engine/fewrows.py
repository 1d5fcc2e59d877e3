"""Products of a few rows with large matrices on a CPU. Knows linear layers; no model.

MKL packs the second factor of a product before it begins. With few rows that is most of the time where the second
factor is the matrix; here the rows are second, and the matrix is read once as it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST = 64
"""Rows from which on the usual order is as fast."""


class RowsSecond(TorchFunctionMode):
    """Within it, every linear layer is computed as (W x^T)^T: the same sums, up to rounding."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        return linear(*args, **named) if func is torch.nn.functional.linear else func(*args, **named)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input` [..., K] times `weight` [V, K] transposed, and `bias` [V] added.

    >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    tensor([[1., 2., 3.]])
    """
    product = torch.mm(weight, input.flatten(0, -2).t()).t()
    added = product if bias is None else product + bias
    return added.contiguous().view(*input.shape[:-1], len(weight))


def few_rows(rows: int, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The mode where it is faster."""
    fits = rows <= MOST and device.type == "cpu" and dtype == torch.float32
    return RowsSecond() if fits else nullcontext()
