"""From hidden states to log-probabilities through the vocabulary, in tiles: no [S, V] tensor beyond a byte budget.

Knows a matrix and what stands behind it (scale, soft cap, temperature); no model, no sequence.

For logits z of one position and target y, `logp = z_y - logsumexp(z)`, so `d logp / d z = onehot(y) - p`; for the
entropy `H = -Σ p log p`, `d H / d z = -p (log p + H)`. Both are applied tile by tile in the backward pass; a tile's
log p is kept from the forward pass while the budget lasts and computed again beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = 32 << 20
KEEP_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """What stands between `hidden @ weight.T + bias` and the softmax: `z = softcap(scale * x) / temperature`."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, x: Tensor) -> Tensor:
        """`x` turned into logits, in place. [S, V]"""
        if self.scale != 1.0:
            x.mul_(self.scale)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x.div_(self.temperature) if self.temperature != 1.0 else x

    def slope(self, logits: Tensor, grad: Tensor) -> Tensor:
        """The gradient by `x` from that by the logits, in place. [S, V]"""
        factor = self.scale / self.temperature
        if factor != 1.0:
            grad.mul_(factor)
        if self.softcap is not None:
            grad.mul_(1 - (logits * (self.temperature / self.softcap)).square_())
        return grad


class Scores(NamedTuple):
    """`logps` [S] of the targets; `entropy` [S] of the distributions, empty unless asked for; in float32."""

    logps: Tensor
    entropy: Tensor


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    shape: Shape | None = None,
    *,
    entropy: bool = False,
    keep_bytes: int = KEEP_BYTES,
    tile_bytes: int = TILE_BYTES,
    into: Tensor | None = None,
) -> Scores:
    """log p of `targets` [S] under softmax(hidden @ weight.T): `hidden` [S, H], `weight` [V, H], `bias` [V].

    Sums are in float32 (float64 when given float64). `keep_bytes` is what one call may hold for its backward pass,
    `tile_bytes` what it works on at a time. The gradient of `weight` is added to `into` [V, H], in float32 or better,
    in place of being returned: no second matrix, and no hook on `weight` hears of it.
    """
    settings = _Settings(shape or Shape(), entropy, keep_bytes, tile_bytes, into)
    return Scores(*_LinearLogps.apply(hidden, weight, bias, targets, settings))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Settings:
    shape: Shape
    entropy: bool
    keep_bytes: int
    tile_bytes: int
    into: Tensor | None

    def tiles(self, positions: int, vocabulary: int, width: int) -> Iterator[slice]:
        rows = max(1, self.tile_bytes // (vocabulary * width))
        return (slice(first, min(first + rows, positions)) for first in range(0, positions, rows))


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        states, matrix = _operands(hidden, weight)
        exact = torch.promote_types(states.dtype, torch.float32)
        logps = torch.empty(len(states), dtype=exact, device=states.device)
        total = torch.empty_like(logps)
        entropy = torch.empty_like(logps) if settings.entropy else logps.new_empty(0)
        kept: dict[int, Tensor] = {}
        left = settings.keep_bytes if any(ctx.needs_input_grad) else 0
        with torch.autocast(states.device.type, enabled=False):
            for part in settings.tiles(len(states), len(matrix), exact.itemsize):
                z = settings.shape.logits(_product(states[part], matrix, bias))
                own = targets[part, None]
                logps[part] = z.gather(1, own).squeeze(1)
                z = _log_softmax_(z)
                total[part] = logps[part] - z.gather(1, own).squeeze(1)
                logps[part] -= total[part]
                if settings.entropy:
                    entropy[part] = -(z.exp() * z).sum(1)
                if z.nbytes <= left:
                    kept[part.start] = z
                    left -= z.nbytes
        ctx.save_for_backward(hidden, weight, bias, targets, total, entropy)
        ctx.settings, ctx.kept = settings, kept
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, total, entropy = ctx.saved_tensors
        settings: _Settings = ctx.settings
        states, matrix = _operands(hidden, weight)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        by_hidden = torch.empty(states.shape, dtype=total.dtype, device=states.device) if wants_hidden else None
        by_weight = settings.into
        by_bias = torch.zeros(len(matrix), dtype=total.dtype, device=states.device) if wants_bias else None
        with torch.autocast(states.device.type, enabled=False):
            for part in settings.tiles(len(states), len(matrix), total.dtype.itemsize):
                logps = ctx.kept.pop(part.start, None)
                if logps is None:
                    logps = settings.shape.logits(_product(states[part], matrix, bias)).sub_(total[part, None])
                slope = _slope(
                    logps, targets[part], grad[part], settings, entropy[part], grad_entropy[part], total[part]
                )
                if by_hidden is not None:
                    by_hidden[part] = _exact(slope, matrix)
                if wants_weight:
                    by_weight = _accumulate(by_weight, slope, states[part])
                if by_bias is not None:
                    by_bias += slope.sum(0)
        by_weight = None if settings.into is not None else by_weight
        by = (x if x is None else x.to(like.dtype) for x, like in ((by_hidden, hidden), (by_weight, weight)))
        return (*by, by_bias if by_bias is None else by_bias.to(bias.dtype), None, None)


def _slope(
    logps: Tensor,
    targets: Tensor,
    grad: Tensor,
    settings: _Settings,
    entropy: Tensor,
    grad_entropy: Tensor,
    total: Tensor,
) -> Tensor:
    """The gradient by `hidden @ weight.T`, computed in the place of `logps` where that is possible. [S, V]"""
    shape = settings.shape
    logits = logps + total[:, None] if shape.softcap is not None else logps
    if settings.entropy:
        p = logps.exp()
        slope = (logps + entropy[:, None]).mul_(p).mul_(-grad_entropy[:, None]).sub_(p.mul_(grad[:, None]))
    else:
        slope = (logps.exp() if shape.softcap is not None else logps.exp_()).mul_(-grad[:, None])
    slope.scatter_add_(1, targets[:, None], grad[:, None].to(slope.dtype))
    return shape.slope(logits, slope)


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """States and matrix in the precision of their product: that of autocast on CUDA, float32 or better elsewhere."""
    if hidden.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    elif hidden.device.type == "cuda" and hidden.dtype == weight.dtype:
        dtype = hidden.dtype
    else:
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    return hidden.detach().to(dtype), weight.detach().to(dtype)


def _product(states: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`states @ matrix.T + bias`, summed and returned in float32 or better. [S, V]"""
    z = _exact(states, matrix.T)
    return z if bias is None else z.add_(bias.detach())


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, summed and returned in float32 or better."""
    if b.dtype in (torch.float32, torch.float64):
        return a.to(b.dtype) @ b
    return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)


def _accumulate(total: Tensor | None, slope: Tensor, states: Tensor) -> Tensor:
    if states.dtype in (torch.float32, torch.float64):
        return slope.T @ states if total is None else total.addmm_(slope.T, states)
    found = _exact(slope.T, states)
    return found if total is None else total.add_(found)


def _log_softmax_(z: Tensor) -> Tensor:
    """`log_softmax` over the last dimension in the place of its argument: its kernel reads and writes row by row."""
    return torch.ops.aten._log_softmax.out(z, -1, False, out=z)  # type: ignore[no-any-return]
