"""Drawing on a CPU: products of few rows with large matrices, and attention of one token a row. Knows linear layers and
attention; no model.

With few rows, most of the time of a product is spent on reading the matrix in an order that suits the processor badly:
here oneDNN packs each matrix once, for as long as rows are drawn. Of rows that share a prompt and stand side by side,
what they share is read once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from prefopt.engine.shortrows import Asked

LEAST = 1 << 16
"""Numbers in a matrix that is worth packing."""
USUAL = 32
"""Rows that it is packed for; it serves any number."""
NAME = "prefopt_few_rows"
"""Of the attention here, among those of transformers."""
UNKNOWN = ("position_bias", "softcap", "cache")
"""What attention may be told besides that is left to PyTorch's kernel, or refused there."""


class Block(NamedTuple):
    """Rows `first` .. `end` - 1, which may see columns `start` .. `stop` - 1, all of them those of the first where
    they are read `together`."""

    first: int
    end: int
    start: int
    stop: int
    together: bool = False

    @property
    def rows(self) -> slice:
        return slice(self.first, self.end)

    @property
    def columns(self) -> slice:
        return slice(self.start, self.stop)


@dataclass
class Step:
    """A step of the first `rows` rows, which see nothing but what is in the blocks, of keys and values in `width`
    columns. Every row is in a block."""

    blocks: Sequence[Block]
    rows: int
    width: int
    biases: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def knows(self, asked: Asked) -> bool:
        """Whether this is the attention of these rows, one token each, under a mask of bits for all heads."""
        mask, (n, heads, tokens, _) = asked.attn_mask, asked.query.shape
        if not (self.blocks and asked.plain and tokens == 1):
            return False
        fits = n == self.rows and asked.key.shape[2] == self.width and heads % asked.key.shape[1] == 0
        return fits and mask is not None and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)

    def bias(self, mask: Tensor) -> Tensor:
        """0 where a row may look, the lowest number elsewhere. Made once for each mask, which is kept: what its number
        stands for must not change."""
        if id(mask) not in self.biases:
            lowest = torch.finfo(torch.float32).min
            self.biases[id(mask)] = mask, torch.zeros(mask.shape).masked_fill_(~mask, lowest)
        return self.biases[id(mask)][1]


_step: ContextVar[Step | None] = ContextVar("step", default=None)
"""Which step the thread is in."""


class Product:
    """Linear layers that are given the same input one after the other: one product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        self.sizes = [len(layer.weight) for layer in layers]
        self.packed: Tensor | None = None
        self.made: list[tuple[Tensor, int]] = []
        """The matrices that it was packed from, each with its version."""
        self.clear()

    def clear(self) -> None:
        self.input: Tensor | None = None
        self.outputs: Sequence[Tensor] = ()

    def __call__(self, place: int, input: Tensor) -> Tensor:
        """What its layer at that place makes of the input [..., in]."""
        if not _plain(input):
            return nn.Linear.forward(self.layers[place], input)
        if place == 0 or input is not self.input:
            self.input, self.outputs = input, torch.split(self._all(input), self.sizes, -1)
        return self.outputs[place].contiguous()

    def _all(self, input: Tensor) -> Tensor:
        biases: list[Tensor] = [layer.bias for layer in self.layers if layer.bias is not None]
        bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
        return torch.ops.mkldnn._linear_pointwise(input, self._matrix(), bias, "none", [], "")  # type: ignore[no-any-return]

    def _matrix(self) -> Tensor:
        """Packed again when one of them has changed."""
        weights: list[Tensor] = [layer.weight for layer in self.layers]
        same = len(self.made) == len(weights) and all(
            old is new and version == new._version for (old, version), new in zip(self.made, weights, strict=True)
        )
        if self.packed is None or not same:
            matrix = weights[0] if len(weights) == 1 else torch.cat(weights)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(matrix.detach(), USUAL)
            self.made = [(weight, weight._version) for weight in weights]
        return self.packed


class FewRows:
    """Within it, the network's linear layers are computed from packed matrices and the attention of single tokens as
    whole products, both in float32: the same numbers up to rounding, which nothing can be derived from. The first step
    watches which layers are given the same input."""

    def __init__(self, network: Any) -> None:
        self.config = network.config.get_text_config()
        self.layers = [layer for layer in network.modules() if _packable(layer)]
        self.seen: list[tuple[nn.Linear, Tensor]] = []
        self.products: list[Product] = []
        self.step = Step((), 0, 0)

    def of(self, step: Step) -> FewRows:
        """Itself, for that step; without blocks for products alone."""
        self.step = step
        return self

    def __enter__(self) -> None:
        self.told = _step.set(self.step)
        self.usual = self.config._attn_implementation
        if self.usual == "sdpa":
            self.config._attn_implementation = NAME
        for layer in self.layers:
            vars(layer)["forward"] = partial(self._watch, layer)
        for product in self.products:
            for place, layer in enumerate(product.layers):
                vars(layer)["forward"] = partial(product, place)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del vars(layer)["forward"]
        for product in self.products:
            product.clear()
        self.config._attn_implementation = self.usual
        _step.reset(self.told)
        if not self.products:
            self.products = [Product(layers) for layers in _together(self.seen)]
            self.seen = []

    def _watch(self, layer: nn.Linear, input: Tensor) -> Tensor:
        if _plain(input):
            self.seen.append((layer, input))
        return nn.Linear.forward(layer, input)


def _together(seen: Sequence[tuple[nn.Linear, Tensor]]) -> list[list[nn.Linear]]:
    """Layers, those together that saw the same input one after the other; each once."""
    groups: list[list[nn.Linear]] = []
    known: set[nn.Linear] = set()
    last: Tensor | None = None
    for layer, input in seen:
        if layer in known:
            continue
        if input is last and (layer.bias is None) == (groups[-1][0].bias is None):
            groups[-1].append(layer)
        else:
            groups.append([layer])
        known.add(layer)
        last = input
    return groups


def _plain(input: Tensor) -> bool:
    """Whether a product of it is one in float32 that nothing is derived from."""
    return not torch.is_grad_enabled() and input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _packable(layer: nn.Module) -> bool:
    """Whether this is a linear layer as PyTorch has it, and large."""
    usual, weight = type(layer).forward is nn.Linear.forward, layer._parameters.get("weight")
    if not usual or "forward" in vars(layer) or weight is None:
        return False
    return weight.numel() >= LEAST and weight.dtype == torch.float32 and weight.is_cpu


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: query [R, H, T, D], keys and values [R, K, T', D]; the answer is
    [R, T, H, D]. What is not the attention of the step's rows goes to PyTorch's kernel."""
    step, asked = _step.get(), Asked(query, key, value, attention_mask, dropout, False, scaling)
    usual = all(more.get(name) is None for name in UNKNOWN)
    if step is None or not usual or torch.is_grad_enabled() or not step.knows(asked):
        given = query, key, value, attention_mask, dropout, scaling
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *given, **more)  # type: ignore[no-any-return]
    return _attention(asked, step).transpose(1, 2), None


def _attention(asked: Asked, step: Step) -> Tensor:
    """Heads that share keys are rows of one product, and so are rows that share a prompt."""
    assert asked.attn_mask is not None
    n, heads, tokens, width = asked.query.shape
    query = asked.query.reshape(n, asked.key.shape[1], -1, width) * asked.factor
    scores = query.new_zeros(*query.shape[:3], asked.key.shape[2])
    for block in step.blocks:
        rows, columns = block.rows, block.columns
        scores[rows, ..., columns] = _product(query[rows], asked.key[rows, :, columns].transpose(2, 3), block.together)
    weights = scores.add_(step.bias(asked.attn_mask)).softmax(-1)
    found = query.new_zeros(*query.shape[:3], asked.value.shape[3])
    for block in step.blocks:
        rows, columns = block.rows, block.columns
        found[rows] += _product(weights[rows, ..., columns], asked.value[rows, :, columns], block.together)
    return found.view(n, heads, tokens, -1)


def _product(rows: Tensor, matrices: Tensor, together: bool) -> Tensor:
    """Rows [n, K, g, D] times their matrices [n, K, D, E], or `together` the first of these for all; [n, K, g, E]."""
    if not together:
        return torch.matmul(rows, matrices)
    n, heads, queries, width = rows.shape
    product = torch.bmm(rows.transpose(0, 1).reshape(heads, n * queries, width), matrices[0])
    return product.view(heads, n, queries, -1).transpose(0, 1)


def few_rows(network: Any, device: torch.device, dtype: torch.dtype) -> FewRows | None:
    """What makes steps of the network faster, where there is something."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return FewRows(network) if known and device.type == "cpu" and dtype == torch.float32 else None


AttentionInterface.register(NAME, _attend)
