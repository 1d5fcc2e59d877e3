"""From hidden states to log-probabilities through the vocabulary, in tiles: no [S, V] tensor beyond a byte budget.

Knows a matrix and what stands behind it (scale, soft cap, temperature); no model, no sequence.

For logits z of one position and target y, `logp = z_y - logsumexp(z)`, so `d logp / d z = onehot(y) - p`; for the
entropy `H = -Σ p log p`, `d H / d z = -p (log p + H)`. Both are applied tile by tile in the backward pass; a tile's
log p is kept from the forward pass while the budget lasts and computed again beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Layer = Callable[[Tensor], Tensor]
Lookup = Callable[[slice], Tensor]
TILE_BYTES = 32 << 20
KEEP_BYTES = 64 << 20


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
    """`logps` [S] of the targets; `entropy` [S] and `collision_entropy` [S] of the distributions, empty unless asked
    for; in float32. No gradient flows through the last."""

    logps: Tensor
    entropy: Tensor
    collision_entropy: Tensor


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    shape: Shape | None = None,
    *,
    entropy: bool = False,
    collision: bool = False,
    keep_bytes: int = KEEP_BYTES,
    tile_bytes: int = TILE_BYTES,
    into: Tensor | None = None,
    layer: Layer | None = None,
    known: Lookup | None = None,
) -> Scores:
    """log p of `targets` [S] under softmax(hidden @ weight.T): `hidden` [S, H], `weight` [V, H], `bias` [V].

    Sums are in float32 (float64 when given float64). `keep_bytes` is what one call may hold for its backward pass,
    `tile_bytes` what it works on at a time. The gradient of `weight` is added to `into` [V, H], in float32 or better,
    in place of being returned: no second matrix, and no hook on `weight` hears of it. `layer` computes
    `hidden @ weight.T + bias` [S, V] where nothing is derived from it; `known` looks it up, a new tensor each time.
    """
    dtype = _precision(hidden, weight)
    settings = _Settings(shape or Shape(), entropy, keep_bytes, tile_bytes, into, dtype, collision, layer, known)
    return Scores(*_LinearLogps.apply(hidden, weight, bias, targets, settings))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Settings:
    shape: Shape
    entropy: bool
    keep_bytes: int
    tile_bytes: int
    into: Tensor | None
    dtype: torch.dtype
    """Of the operands of products; autocast is over when the backward pass runs, so it is settled before."""
    collision: bool = False
    layer: Layer | None = None
    known: Lookup | None = None

    def product(self, states: Tensor, part: slice, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Of the states in `part`."""
        if self.known is not None:
            return self.known(part)
        return _product(states[part], matrix, bias) if self.layer is None else self.layer(states[part])

    def tiles(self, positions: int, vocabulary: int, width: int) -> Iterator[slice]:
        rows = max(1, self.tile_bytes // (vocabulary * width))
        return (slice(first, min(first + rows, positions)) for first in range(0, positions, rows))


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        states, matrix = _operands(hidden, weight, settings.dtype)
        exact = torch.promote_types(states.dtype, torch.float32)
        logps = torch.empty(len(states), dtype=exact, device=states.device)
        total = torch.empty_like(logps)
        entropy = torch.empty_like(logps) if settings.entropy else logps.new_empty(0)
        collision = torch.empty_like(logps) if settings.collision else logps.new_empty(0)
        kept: dict[int, Tensor] = {}
        left = settings.keep_bytes if any(ctx.needs_input_grad) and settings.known is None else 0
        with torch.autocast(states.device.type, enabled=False):
            for part in settings.tiles(len(states), len(matrix), exact.itemsize):
                z = settings.shape.logits(settings.product(states, part, matrix, bias))
                own = targets[part, None]
                logps[part] = z.gather(1, own).squeeze(1)
                z = _log_softmax_(z)
                total[part] = logps[part] - z.gather(1, own).squeeze(1)
                logps[part] -= total[part]
                if settings.entropy:
                    entropy[part] = -(z.exp() * z).sum(1)
                if settings.collision:
                    collision[part] = -torch.logsumexp(2 * z, 1)
                if z.nbytes <= left:
                    kept[part.start] = z
                    left -= z.nbytes
                del z  # before the next product makes another
        ctx.save_for_backward(hidden, weight, bias, targets, total, entropy)
        ctx.settings, ctx.kept = settings, kept
        ctx.mark_non_differentiable(collision)
        return logps, entropy, collision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, total, entropy = ctx.saved_tensors
        settings: _Settings = ctx.settings
        states, matrix = _operands(hidden, weight, settings.dtype)
        slopes = _Slopes(ctx.needs_input_grad[:3], states, matrix, total.dtype, settings.into)
        with torch.autocast(states.device.type, enabled=False):
            for part in settings.tiles(len(states), len(matrix), total.dtype.itemsize):
                logps = ctx.kept.pop(part.start, None)
                if logps is None:
                    logps = settings.shape.logits(settings.product(states, part, matrix, bias))
                    logps.sub_(total[part, None])
                slope = _slope(
                    logps, targets[part], grad[part], settings, entropy[part], grad_entropy[part], total[part]
                )
                slopes.add(part, slope)
                del logps, slope
        return (*slopes.like(hidden, weight, bias), None, None)


@dataclass(frozen=True, slots=True)
class Head:
    """A vocabulary's matrix [V, H], its bias [V], and what stands behind them."""

    weight: Tensor
    bias: Tensor | None = None
    shape: Shape = Shape()

    def logps(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """[S, H] -> [S, V], whole, from operands of this precision."""
        return _log_softmax_(self.logits(states, dtype))

    def logits(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """[S, H] -> [S, V], whole, from operands of this precision."""
        operand, matrix = _operands(states, self.weight, dtype)
        return self.shape.logits(_product(operand, matrix, self.bias))


def linear_kl(
    hidden: Tensor,
    head: Head,
    reference_hidden: Tensor,
    reference: Head,
    *,
    tile_bytes: int = TILE_BYTES,
    into: Tensor | None = None,
) -> Tensor:
    """`KL(reference || policy)` of the distributions after each state, over the whole vocabulary, in nats. [S]

    `hidden`, `reference_hidden` [S, H]; the gradient is by `hidden` and `head`, as for `linear_logps`. Tiles are
    computed again in the backward pass.
    """
    settings = _Settings(head.shape, False, 0, tile_bytes, into, _precision(hidden, head.weight))
    frozen = (reference_hidden.detach(), reference)
    return _LinearKL.apply(hidden, head.weight, head.bias, frozen, settings)  # type: ignore[no-any-return,no-untyped-call]


class _LinearKL(torch.autograd.Function):
    """For p of the policy and q of the reference, `d KL(q || p) / d z = p - q`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        frozen: tuple[Tensor, Head],
        settings: _Settings,
    ) -> Tensor:
        others, reference = frozen
        head = Head(weight, bias, settings.shape)
        found = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in settings.tiles(len(hidden), len(weight), found.dtype.itemsize):
                theirs = reference.logps(others[part], settings.dtype)
                found[part] = (theirs.exp() * (theirs - head.logps(hidden[part], settings.dtype))).sum(1)
        ctx.save_for_backward(hidden, weight, bias, others)
        ctx.settings, ctx.reference = settings, reference
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, others = ctx.saved_tensors
        settings: _Settings = ctx.settings
        head = Head(weight, bias, settings.shape)
        states, matrix = _operands(hidden, weight, settings.dtype)
        slopes = _Slopes(ctx.needs_input_grad[:3], states, matrix, grad.dtype, settings.into)
        with torch.autocast(states.device.type, enabled=False):
            for part in settings.tiles(len(states), len(matrix), grad.dtype.itemsize):
                logits = head.logits(hidden[part], settings.dtype)
                theirs = ctx.reference.logps(others[part], settings.dtype).exp_()
                slope = torch.softmax(logits, 1).sub_(theirs).mul_(grad[part, None])
                slopes.add(part, settings.shape.slope(logits, slope))
        return (*slopes.like(hidden, weight, bias), None, None)


class _Slopes:
    """Gradients by states, matrix and bias, summed tile by tile from those by `hidden @ weight.T`."""

    def __init__(
        self, wanted: tuple[bool, ...], states: Tensor, matrix: Tensor, dtype: torch.dtype, into: Tensor | None
    ) -> None:
        self.states, self.matrix, self.into = states, matrix, into
        self.wants_weight = wanted[1]
        self.by_weight = into
        self.by_hidden = torch.empty(states.shape, dtype=dtype, device=states.device) if wanted[0] else None
        self.by_bias = torch.zeros(len(matrix), dtype=dtype, device=states.device) if wanted[2] else None

    def add(self, part: slice, slope: Tensor) -> None:
        """`slope` [S, V] of the states in `part`."""
        if self.by_hidden is not None:
            self.by_hidden[part] = _exact(slope, self.matrix)
        if self.wants_weight:
            self.by_weight = _accumulate(self.by_weight, slope, self.states[part])
        if self.by_bias is not None:
            self.by_bias += slope.sum(0)

    def like(self, *inputs: Tensor | None) -> Iterator[Tensor | None]:
        """The gradients in the precisions of hidden, weight and bias; none of a weight's that went elsewhere."""
        by_weight = self.by_weight if self.into is None else None
        for found, given in zip((self.by_hidden, by_weight, self.by_bias), inputs, strict=True):
            yield found if found is None or given is None else found.to(given.dtype)


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


def _precision(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the operands of a product: that of autocast on CUDA, float32 or better elsewhere."""
    if hidden.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    if hidden.device.type == "cuda" and hidden.dtype == weight.dtype:
        return hidden.dtype
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _operands(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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
