"""Drawing on a CPU: products of few rows with large matrices, and attention of one token a row. Knows linear layers and
the attention of transformers; no architecture.

With few rows, most of the time of a product is spent on reading the matrix in an order that suits the processor badly:
here oneDNN packs each matrix once, for as long as rows are drawn. What rows share of a prompt is read for many at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from prefopt.engine.pages import PAGE, Orders, Sharing
from prefopt.engine.shortrows import Asked

LEAST = 1 << 16
"""Numbers in a matrix that is worth packing."""
USUAL = 32
"""Rows that it is packed for; it serves any number."""
NAME = "prefopt_few_rows"
"""Of the attention here, among those of transformers."""
UNKNOWN = ("position_bias", "softcap", "cache")
"""What attention may be told besides that is left to PyTorch's kernel, or refused there."""


class Step:
    """A step of some rows, one token each. Of keys and values each has some of its own, up to `width`, and sees some of
    the `longest` on its pages: a mask says which, [rows, 1, 1, longest + width]."""

    def __init__(self, sharing: Sharing, own: Sequence[int]) -> None:
        """How many tokens each row has of its own, with that of the step."""
        self.sharing, self.own, self.width = sharing, own, max(own)
        self.longest = sharing.longest
        self.prompts: Sequence[Tensor] = ()
        """Of the layer in progress, its pages: keys [end or more, K, D, PAGE], values [end or more, K, PAGE, D]."""
        self.biases: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def counts(self) -> Tensor:
        """The same as `own`, in int32."""
        return torch.tensor(self.own, dtype=torch.int32)

    def knows(self, asked: Asked) -> bool:
        """Whether this is the attention of these rows, one token each, under a mask of bits for all heads."""
        mask, (n, heads, tokens, _) = asked.attn_mask, asked.query.shape
        if mask is None or mask.dtype != torch.bool or not asked.plain or tokens != 1:
            return False
        fits = n == len(self.own) and asked.key.shape[2] == self.width and heads % asked.key.shape[1] == 0
        return fits and mask.shape == (n, 1, 1, self.longest + self.width)

    def bias(self, mask: Tensor) -> Tensor:
        """0 where a row may look, the lowest number elsewhere. Made once for each mask, which is kept: what its number
        stands for must not change."""
        if id(mask) not in self.biases:
            lowest = torch.finfo(torch.float32).min
            self.biases[id(mask)] = mask, torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, lowest)
        return self.biases[id(mask)][1]

    def scores(self, query: Tensor) -> Tensor:
        """Of each row's query [n, K, g, D] with the keys on its pages; [n, K, g, longest]."""
        n, heads, queries, size = query.shape
        orders, keys = self._read(0, heads)
        asked = query.flatten(0, 1).index_select(0, orders.rows).view(len(keys), -1, size)
        found = torch.bmm(asked, keys).view(-1, queries, PAGE).index_select(0, orders.back)
        found = found.view(n, heads, -1, queries, PAGE).transpose(2, 3).reshape(n, heads, queries, -1)
        if orders.without is not None:
            found[orders.without] = 0  # what stands there is of others, and may be no number
        return found

    def sums(self, weights: Tensor) -> Tensor:
        """Of the values on each row's pages, with weights [n, K, g, longest]; [n, K, g, D]."""
        n, heads, queries, _ = weights.shape
        orders, values = self._read(1, heads)
        cut = weights.view(n, heads, queries, -1, PAGE).transpose(2, 3).reshape(-1, queries, PAGE)
        each = torch.bmm(cut.index_select(0, orders.weights).view(len(values), -1, PAGE), values)
        found = embedding_bag(orders.own, each.view(len(orders.weights), -1), orders.starts, mode="sum")
        return found.view(n, heads, queries, -1)

    def _read(self, which: int, heads: int) -> tuple[Orders, Tensor]:
        """Keys or values of the pages that are read, [readings * K, ...]."""
        orders, x = self.sharing.orders(heads), self.prompts[which]
        read = x[: self.sharing.end] if orders.pages is None else x.index_select(0, orders.pages)
        return orders, read.flatten(0, 1)


_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_known = torch.backends.mkldnn.is_available() and _product is not None  # type: ignore[no-untyped-call]
Heard = Callable[[Tensor, Tensor, Tensor], None]
"""Is told the matrix of a layer, the marks of what it was given, and the product."""
_step: ContextVar[Step | None] = ContextVar("step", default=None)
"""Which step the thread is in."""


class Product:
    """Linear layers that are given the same input one after the other: one product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        self.sizes = [len(layer.weight) for layer in layers]
        self.made: list[tuple[Tensor, int]] = []
        """The matrices that it was packed from, each with its version."""
        self.packed: Tensor | None = None
        self.bias: Tensor | None = None
        self.heard: Heard | None = None
        self.clear()

    def ready(self) -> None:
        """Packs the matrices if one of them has changed."""
        weights: list[Tensor] = [layer.weight for layer in self.layers]
        same = all(
            new is old and new._version == version for new, (old, version) in zip(weights, self.made, strict=False)
        )
        if not same or not self.made:
            matrix = weights[0] if len(weights) == 1 else torch.cat(weights)
            self.packed = self.pack(matrix.detach())
            self.made = [(weight, weight._version) for weight in weights]
        biases: list[Tensor] = [layer.bias for layer in self.layers if layer.bias is not None]
        self.bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)

    def clear(self) -> None:
        self.input: Tensor | None = None
        self.outputs: Sequence[Tensor] = ()

    def __call__(self, place: int, input: Tensor) -> Tensor:
        """What its layer at that place makes of the input [..., in]."""
        if not _plain(input):
            return nn.Linear.forward(self.layers[place], input)
        if len(self.sizes) == 1:
            return self.whole(input)
        if place == 0 or input is not self.input:
            self.input = input
            self.outputs = self.whole(input).split_with_sizes(self.sizes, -1)
        return self.outputs[place].contiguous()

    def whole(self, input: Tensor, rows: int | None = None) -> Tensor:
        """What all its layers make of the input [..., in], one beside the other. Of the first rows is told, or of
        all."""
        found = self.compute(input)
        if self.heard is not None:
            marked, told = marks(input[:rows]), found if rows in (None, len(found)) else found[:rows].clone()
            for layer, output in zip(self.layers, told.split_with_sizes(self.sizes, -1), strict=True):
                self.heard(layer.weight, marked, output)
        return found

    def pack(self, matrix: Tensor) -> Tensor:
        """The matrix [out, in] as `compute` wants it."""
        return torch.ops.mkldnn._reorder_linear_weight(matrix, USUAL)  # type: ignore[no-any-return]

    def compute(self, input: Tensor) -> Tensor:
        return _product(input, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


def marks(given: Tensor) -> Tensor:
    """A number for each row of what a layer is given, [..., in] -> [...], that tells rows apart."""
    return given.detach() @ _gauge(given.shape[-1])


@lru_cache(maxsize=16)
def _gauge(size: int) -> Tensor:
    """Numbers with which rows of a norm that centres them have no sum of zero."""
    return torch.randn(size, generator=torch.Generator().manual_seed(size))


def packed(layer: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """What computes the products of this layer, which stays as it is, where there is something faster."""
    if not _known or not _packable(layer):
        return None
    product = Product([layer])
    product.ready()
    return partial(product, 0)


class FewRows:
    """Within it, the network's linear layers are computed from packed matrices and the attention of single tokens as
    whole products, both in float32: the same numbers up to rounding, which nothing can be derived from. The first step
    watches which layers are given the same input. Meanwhile the network is for one thread alone."""

    kind: type[Product] = Product
    """Of the products that are made."""

    def __init__(self, network: Any) -> None:
        self.config = network.config.get_text_config()
        self.layers = [layer for layer in network.modules() if _packable(layer)]
        self.seen: list[tuple[nn.Linear, Tensor]] = []
        self.products: list[Product] = []
        self.forwards: list[tuple[dict[str, Any], Any]] = [
            (vars(layer), partial(self._watch, layer)) for layer in self.layers
        ]
        """What is put into which layers while a step lasts."""
        self.step: Step | None = None
        self.heard: Heard | None = None

    def of(self, step: Step) -> FewRows:
        """Itself, for that step; without one for products alone."""
        self.step = step
        return self

    def __enter__(self) -> None:
        for product in self.products:
            product.ready()
        self.told = _step.set(self.step)
        if self.step is not None:
            self.usual, self.config._attn_implementation = self.config._attn_implementation, NAME
        for own, forward in self.forwards:
            own["forward"] = forward

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for own, _forward in self.forwards:
            del own["forward"]
        for product in self.products:
            product.clear()
        if self.step is not None:
            self.config._attn_implementation, self.step = self.usual, None
        _step.reset(self.told)
        if self.seen and error is None:
            self.products = [self.kind(layers) for layers in _together(self.seen)]
            self.forwards = [
                (vars(layer), partial(product, place))
                for product in self.products
                for place, layer in enumerate(product.layers)
            ]
            for product in self.products:
                product.heard = self.heard
        self.seen.clear()

    def _watch(self, layer: nn.Linear, input: Tensor) -> Tensor:
        output = nn.Linear.forward(layer, input)
        if _plain(input):
            self.seen.append((layer, input))
            if self.heard is not None:
                self.heard(layer.weight, marks(input), output)
        return output


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
    if step is None or not usual(more) or torch.is_grad_enabled() or not step.knows(asked):
        given = query, key, value, attention_mask, dropout, scaling
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *given, **more)  # type: ignore[no-any-return]
    return attention(asked, step).transpose(1, 2), None


def usual(more: Mapping[str, Any]) -> bool:
    """Whether attention is told nothing besides that changes it."""
    return all(more.get(name) is None for name in UNKNOWN)


def attention(asked: Asked, step: Step) -> Tensor:
    """Heads that share keys are rows of one product, and so are rows that share a page of a prompt."""
    assert asked.attn_mask is not None
    n, heads, tokens, width = asked.query.shape
    query = asked.query.reshape(n, asked.key.shape[1], -1, width) * asked.factor
    scores = torch.matmul(asked.key, query.transpose(2, 3)).transpose(2, 3)  # faster than the other way round
    if step.longest:
        scores = torch.cat([step.scores(query), scores], -1)
    weights = scores.add_(step.bias(asked.attn_mask)).softmax(-1)
    found = torch.matmul(weights[..., step.longest :], asked.value)
    if step.longest:
        found += step.sums(weights[..., : step.longest])
    return found.view(n, heads, tokens, -1)


def able(network: Any) -> bool:
    """Whether there is something that makes steps of the network faster: on a CPU, in float32."""
    vectors = network.get_input_embeddings().weight
    return bool(_known and vectors.is_cpu and vectors.dtype == torch.float32)


AttentionInterface.register(NAME, _attend)
