"""Drawing on a CPU: products of few rows with large matrices, and attention of one token a row. Knows linear layers and
the attention of transformers; no architecture.

With few rows, most of the time of a product is spent on reading the matrix in an order that suits the processor badly:
here oneDNN packs each matrix once, for as long as rows are drawn. What rows share of a prompt is read once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from operator import is_
from typing import Any

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


class Step:
    """A step of some rows, one token each. Of keys and values every row has `width` of its own, and sees some of the
    first `longest` of the prompt in its place: a mask says which, [rows, 1, 1, longest + width]."""

    def __init__(self, places: Sequence[int], longest: int, width: int) -> None:
        """`places` of the rows, -1 for one without a prompt."""
        self.rows, self.longest, self.width = len(places), longest, width
        self.places = 1 + max(places, default=-1)
        self.prompts: Sequence[Tensor] = ()
        """Keys and values of the layer in progress, [places or more, K, longest or more, D]."""
        within: list[list[int]] = [[] for _ in range(self.places)]
        back = []
        for row, place in enumerate(max(place, 0) for place in places if self.places):
            back.append((place, len(within[place])))
            within[place].append(row)
        most = max(map(len, within), default=0)
        filled = [rows + [0] * (most - len(rows)) for rows in within]
        self.spread = torch.tensor(filled, dtype=torch.long).view(self.places, most)
        """Which rows have their prompt in each place, and row 0 as often as needed. [places, most]"""
        self.back = torch.tensor(back, dtype=torch.long).view(-1, 2)
        """The place of each row, and where it is among those that have it. [rows, 2]"""
        self.orders: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.biases: dict[int, tuple[Tensor, Tensor]] = {}

    def knows(self, asked: Asked) -> bool:
        """Whether this is the attention of these rows, one token each, under a mask of bits for all heads."""
        mask, (n, heads, tokens, _) = asked.attn_mask, asked.query.shape
        if mask is None or mask.dtype != torch.bool or not asked.plain or tokens != 1:
            return False
        fits = n == self.rows and asked.key.shape[2] == self.width and heads % asked.key.shape[1] == 0
        return fits and mask.shape == (n, 1, 1, self.longest + self.width)

    def bias(self, mask: Tensor) -> Tensor:
        """0 where a row may look, the lowest number elsewhere, [rows, 1, 1, longest + width]; of rows with prompts by
        place, [places, 1, most, 1, longest + width]. Made once for each mask, which is kept: what its number stands for
        must not change."""
        if id(mask) not in self.biases:
            lowest = torch.finfo(torch.float32).min
            bias = torch.zeros(mask.shape).masked_fill_(~mask, lowest)
            self.biases[id(mask)] = mask, bias[self.spread].transpose(1, 2) if self.places else bias
        return self.biases[id(mask)][1]

    def by_place(self, rows: Tensor) -> Tensor:
        """[rows, K, g, D] -> [places x K, most x g, D]."""
        _, heads, queries, size = rows.shape
        found = rows.reshape(-1, size).index_select(0, self._order(heads, queries)[0])
        return found.view(self.places * heads, -1, size)

    def by_row(self, found: Tensor, heads: int, queries: int) -> Tensor:
        """[places x K, most x g, D] -> [rows, K, g, D]."""
        rows = found.flatten(0, 1).index_select(0, self._order(heads, queries)[1])
        return rows.view(self.rows, heads, queries, -1)

    def _order(self, heads: int, queries: int) -> tuple[Tensor, Tensor]:
        """Which of rows x K x g stands where among places x K x most x g, and which of these where among those."""
        if (heads, queries) not in self.orders:
            head, query = torch.arange(heads)[:, None, None], torch.arange(queries)
            there = (self.spread[:, None, :, None] * heads + head) * queries + query
            place, among = (x[:, None, None] for x in self.back.unbind(1))
            back = ((place * heads + head[:, 0]) * self.spread.shape[1] + among) * queries + query
            self.orders[heads, queries] = there.flatten(), back.flatten()
        return self.orders[heads, queries]


_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_known = torch.backends.mkldnn.is_available() and _product is not None  # type: ignore[no-untyped-call]
_step: ContextVar[Step | None] = ContextVar("step", default=None)
"""Which step the thread is in."""


class Product:
    """Linear layers that are given the same input one after the other: one product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        self.sizes = [len(layer.weight) for layer in layers]
        self.parts: list[Tensor] = []
        self.versions: list[int] = []
        """What it was packed from."""
        self.packed: Tensor | None = None
        self.bias: Tensor | None = None
        self.clear()

    def ready(self) -> None:
        """Packs matrices and biases if one of them has changed."""
        parts: list[Tensor] = [x for layer in self.layers for x in layer._parameters.values() if x is not None]
        versions = [x._version for x in parts]
        if versions == self.versions and all(map(is_, parts, self.parts)):
            return
        weights, biases = ([x for x in parts if x.dim() == dim] for dim in (2, 1))
        self.packed = torch.ops.mkldnn._reorder_linear_weight(_one(weights), USUAL)
        self.bias = _one(biases) if biases else None
        self.parts, self.versions = parts, versions

    def clear(self) -> None:
        self.input: Tensor | None = None
        self.outputs: list[Tensor] = []

    def __call__(self, place: int, input: Tensor) -> Tensor:
        """What its layer at that place makes of the input [..., in]."""
        if not _plain(input):
            return nn.Linear.forward(self.layers[place], input)
        if len(self.sizes) == 1:
            return _product(input, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]
        if place == 0 or input is not self.input:
            self.input = input
            self.outputs = _product(input, self.packed, self.bias, "none", [], "").split_with_sizes(self.sizes, -1)
        return self.outputs[place].contiguous()


def _one(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].detach() if len(parts) == 1 else torch.cat([x.detach() for x in parts])


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

    def __init__(self, network: Any) -> None:
        self.config = network.config.get_text_config()
        self.layers = [layer for layer in network.modules() if _packable(layer)]
        self.seen: list[tuple[nn.Linear, Tensor]] = []
        self.products: list[Product] = []
        self.forwards: list[tuple[dict[str, Any], Any]] = [
            (vars(layer), partial(_watch, self.seen, layer)) for layer in self.layers
        ]
        """What is put into which layers while a step lasts."""
        self.step: Step | None = None

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
            self.products = [Product(layers) for layers in _together(self.seen)]
            self.forwards = [
                (vars(layer), partial(product, place))
                for product in self.products
                for place, layer in enumerate(product.layers)
            ]
        self.seen.clear()


def _watch(seen: list[tuple[nn.Linear, Tensor]], layer: nn.Linear, input: Tensor) -> Tensor:
    if _plain(input):
        seen.append((layer, input))
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
    own, bias = torch.matmul(query, asked.key.transpose(2, 3)), step.bias(asked.attn_mask)
    if not step.longest:
        return torch.matmul(own.add_(bias).softmax(-1), asked.value).view(n, heads, tokens, -1)
    keys, values = (x[: step.places, :, : step.longest].flatten(0, 1) for x in step.prompts)
    scores = torch.cat([torch.bmm(step.by_place(query), keys.transpose(1, 2)), step.by_place(own)], -1)
    by_query = scores.view(step.places, query.shape[1], -1, query.shape[2], scores.shape[-1])
    weights = by_query.add_(bias).softmax(-1).view_as(scores)
    found = step.by_row(torch.bmm(weights[..., : step.longest], values), *query.shape[1:3])
    found += torch.matmul(step.by_row(weights[..., step.longest :], *query.shape[1:3]), asked.value)
    return found.view(n, heads, tokens, -1)


def able(network: Any) -> bool:
    """Whether there is something that makes steps of the network faster: on a CPU, in float32."""
    vectors = network.get_input_embeddings().weight
    return bool(_known and vectors.is_cpu and vectors.dtype == torch.float32)


AttentionInterface.register(NAME, _attend)
