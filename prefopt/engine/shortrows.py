"""Attention over short rows, and rows that branch, on a CPU. Knows queries, keys, values and a mask; no model.

PyTorch's kernel goes through attention block by block, which saves memory in long rows. In short ones the weights are
small, and whole products of them take about half the time; where rows branch often, products of their parts take less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from prefopt.engine.branches import Tree, branched, trees

LONGEST = 320
"""Tokens of a row from which on PyTorch's kernel is as fast."""
KEPT_BYTES = 32 << 20
"""What the weights of one layer may take: they are kept for the backward pass, which PyTorch's kernel does without."""


class Asked(NamedTuple):
    """A call of `scaled_dot_product_attention`: queries [R, H, T, D], keys and values [R, K, T, D], K divides H."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def factor(self) -> float:
        """What scores are multiplied with."""
        return float(self.query.shape[-1] ** -0.5 if self.scale is None else self.scale)

    @property
    def plain(self) -> bool:
        """In float32 on a CPU, without dropout."""
        tensors = (self.query, self.key, self.value)
        same = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 4 for x in tensors)
        return same and not self.dropout_p and not torch.is_autocast_enabled("cpu")


class ShortRows(TorchFunctionMode):
    """Within it, `scaled_dot_product_attention` over short rows, or rows that branch often, in float32 on a CPU is
    computed from whole matrices of weights: the same numbers up to rounding. It is for one pass, of few masks."""

    def __init__(self) -> None:
        super().__init__()
        self.biases: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.trees: dict[int, tuple[Tensor, tuple[Tree, ...]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            asked = Asked(*args, **(kwargs or {}))
            if rows := self._trees(asked):
                return branched(asked.query, asked.key, asked.value, rows, asked.factor)
            if _short(asked):
                return self._attention(asked)
        return func(*args, **(kwargs or {}))

    def _trees(self, asked: Asked) -> tuple[Tree, ...]:
        """Of the rows, where it is worth to go by them."""
        mask, (rows, heads, tokens, _) = asked.attn_mask, asked.query.shape
        if mask is None or not asked.plain or not _selects(mask, (rows, 1, tokens, tokens)):
            return ()
        if id(mask) not in self.trees:
            self.trees[id(mask)] = mask, trees(mask)
        found = self.trees[id(mask)][1]
        return found if 4 * heads * sum(tree.weights for tree in found) <= KEPT_BYTES else ()

    def _attention(self, asked: Asked) -> Tensor:
        bias = self._bias(asked.attn_mask, asked.query.shape[-2])
        return _Attention.apply(asked.query, asked.key, asked.value, bias, asked.factor)  # type: ignore[no-any-return,no-untyped-call]

    def _bias(self, mask: Tensor | None, tokens: int) -> Tensor:
        """Made once for each mask, which is kept: what its number stands for must not change."""
        key = id(mask), tokens
        if key not in self.biases:
            self.biases[key] = mask, _bias(mask, tokens)
        return self.biases[key][1]


def _selects(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.dtype == torch.bool and mask.shape == shape


def _short(asked: Asked) -> bool:
    """Whether this is one of the calls that whole matrices answer sooner: causal, or under one mask for all heads."""
    mask, (rows, heads, tokens, _) = asked.attn_mask, asked.query.shape
    known = asked.is_causal if mask is None else mask.dtype == torch.bool and mask.shape[-3:-2] == (1,)
    small = tokens <= LONGEST and 4 * rows * heads * tokens**2 <= KEPT_BYTES
    return asked.plain and known and small and asked.key.shape[-2] == tokens


def _bias(mask: Tensor | None, tokens: int) -> Tensor:
    """0 where a token may look, the lowest number elsewhere. [R or 1, 1, T, T]"""
    visible = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril_() if mask is None else mask
    return torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)


class _Attention(torch.autograd.Function):
    """Heads that share keys are rows of one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        (rows, heads, tokens, _), groups = query.shape, key.shape[0] * key.shape[1]
        q, k, v = (x.reshape(groups, -1, x.shape[-1]) for x in (query, key, value))
        weights = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)
        weights.view(rows, heads, tokens, tokens).add_(bias)
        torch.ops.aten._softmax.out(weights, -1, False, out=weights)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return torch.bmm(weights, v).view(rows, heads, tokens, v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        by_output = grad.reshape(*q.shape[:2], v.shape[-1])
        by_weights = torch.bmm(by_output, v.transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(by_weights, weights, -1, weights.dtype, grad_input=by_weights)
        by_weights.mul_(ctx.scale)
        slopes = (
            torch.bmm(by_weights, k),
            torch.bmm(by_weights.transpose(1, 2), q),
            torch.bmm(weights.transpose(1, 2), by_output),
        )
        return (*(x.view(shape) for x, shape in zip(slopes, ctx.shapes, strict=True)), None, None)
