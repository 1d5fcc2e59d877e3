"""Steps of rows on a CPU that are compiled: what a model does between its products becomes a few loops in C++, where
Python calls some forty operations a layer. Knows slots, products and attention; no architecture.

To the compiler a product is an operation without insides, and so is attention with the keys and values it writes and
reads: both have `kernels` of their own. A step is compiled once for a network, for any number of rows from two on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface

from prefopt.engine.fewrows import Product, usual
from prefopt.engine.kernels import Panels, attend
from prefopt.engine.shared import Shared
from prefopt.engine.shortrows import Asked
from prefopt.engine.slots import forward

NAME = "prefopt_compiled"
"""Of the attention that a step is compiled with, among those of transformers."""
ROWS, COLUMNS = 64, 256
"""The size that compiled steps are best at; they hold for others too."""
Mask: TypeAlias = Tensor | dict[str, Tensor]
OPERATIONS: Any = torch.library.Library("prefopt", "DEF")  # type: ignore[no-untyped-call]
OPERATIONS.define("product(Tensor input, int number, int size) -> Tensor")
OPERATIONS.define("attend(Tensor query, Tensor key, Tensor value, Tensor mask, int layer, float scaling) -> Tensor")


class Program(NamedTuple):
    """A compiled step."""

    compute: Callable[..., Any]
    sources: tuple[str | Tensor | None, ...]
    """What it is given: a tensor of the network, by name, one of its own, or the next of those that the step has."""
    wanted: tuple[bool, ...]
    """Which of the step's own it looks at."""
    groups: tuple[tuple[int, ...], ...]
    """The layers of each product."""
    shapes: tuple[torch.Size | None, ...] = ()
    """Of what it is given."""

    def given(self, network: nn.Module) -> list[Tensor | None]:
        """Those of the network and its own; None for the step's."""
        return [_found(network, source) if isinstance(source, str) else source for source in self.sources]


_known: WeakKeyDictionary[nn.Module, Program] = WeakKeyDictionary()
_arena: ContextVar[Compiled] = ContextVar("arena")
"""Whose step is being computed."""


class Compiled(Shared):
    """Implements `prefopt.sampling.Arena` with compiled steps, but for the first of each arena, which finds out about
    its products. A single row is there twice between products and attention, also for a model that counts rows: PyTorch
    would compile it once more."""

    program: Program | None = None
    given: List[Tensor | None] = ()
    single = False
    """Whether the step in progress has one row."""

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        assert self.few_rows is not None
        self.few_rows.kind = Panels

    @staticmethod
    def knows(network: nn.Module) -> bool:
        """Whether its steps are compiled."""
        return network in _known

    def _forward(self, ids: Tensor, seen: Mask, positions: Tensor) -> Tensor:
        assert self.few_rows is not None
        if self.program is None and self.few_rows.products:
            self._find(ids, seen, positions)
        if self.program is None:
            return super()._forward(ids, seen, positions)
        self.single = len(ids) == 1
        tensors = map(self.again, tree_leaves((ids, seen, positions)))
        own = (x.contiguous() for x, wanted in zip(tensors, self.program.wanted, strict=True) if wanted)
        token = _arena.set(self)
        try:
            (logits,) = self.program.compute(*(next(own) if x is None else x for x in self.given))
        finally:
            _arena.reset(token)
        return self.once(logits)

    def once(self, x: Tensor) -> Tensor:
        """[2, ...], a single row twice, as the row [1, ...]; others as they are."""
        return x[:1] if self.single and len(x) == 2 else x

    def again(self, x: Tensor) -> Tensor:
        """A single row [1, ...] twice; others as they are."""
        return x.repeat(2, *[1] * (x.dim() - 1)) if self.single and len(x) == 1 else x

    def _find(self, *example: Any) -> None:
        """The program of the network, which is compiled unless it is there. A network that has other layers or sizes
        since then goes without."""
        assert self.few_rows is not None
        groups = tuple(tuple(map(id, product.layers)) for product in self.few_rows.products)
        if self.network not in _known:
            _known[self.network] = _compiled(self, groups, *example)
        program = _known[self.network]
        if program.groups == groups and _shapes(given := program.given(self.network)) == program.shapes:
            self.program, self.given = program, given


def _compiled(arena: Compiled, groups: tuple[tuple[int, ...], ...], *example: Any) -> Program:
    from torch._inductor import standalone_compile  # takes seconds to import

    program = _exported(arena, *example)
    graph = program.graph_module
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    specs = program.graph_signature.input_specs
    sources: list[str | Tensor | None] = []
    wanted = []
    for node, spec in zip(inputs, specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            wanted.append(bool(node.users))
        if not node.users:
            graph.graph.erase_node(node)
        elif spec.kind == InputKind.USER_INPUT:
            sources.append(None)
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            sources.append(program.constants[spec.target])
        else:
            sources.append(spec.target.removeprefix("network."))
    for node in graph.graph.output_node().all_input_nodes:
        node.meta["example_value"] = node.meta["val"]  # where sizes are known from
    graph.recompile()
    given = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        compute = standalone_compile(graph, given, dynamic_shapes="from_graph")
    made = Program(compute, tuple(sources), tuple(wanted), groups)
    return made._replace(shapes=_shapes(made.given(arena.network)))


def _exported(arena: Compiled, ids: Tensor, seen: Mask, positions: Tensor) -> ExportedProgram:
    """The operations of a step, with those of this module in it."""
    rows, columns = Dim("rows", min=2), Dim("columns", min=2)
    example = tree_map_only(Tensor, _resized, (ids, seen, positions))
    sizes = tree_map_only(Tensor, lambda x: {0: rows} if x.dim() == 2 else {0: rows, 3: columns}, example)
    with torch.no_grad(), _in_operations(arena):
        return torch.export.export(_Step(arena.network), example, dynamic_shapes=sizes, strict=False)


def _resized(x: Tensor) -> Tensor:
    """Zeros like it, for the rows and columns that steps are best at. [n, 1] or [n, 1, 1, width]"""
    return x.new_zeros(ROWS, *x.shape[1:-1], COLUMNS if x.dim() == 4 else 1)


class _Step(nn.Module):
    """A step as a function of its tensors."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        layers = network.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[_Through() for _ in range(layers)])

    def forward(self, ids: Tensor, seen: Mask, positions: Tensor) -> Tensor:
        return forward(self.network, self.cache, ids, seen, positions)


class _Through(CacheLayerMixin):  # type: ignore[misc]
    """Hands keys and values on: the operation keeps them."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _Operation(Product):
    """A product as an operation without insides."""

    def __init__(self, layers: List[nn.Linear], number: int) -> None:
        super().__init__(layers)
        self.number = number

    def whole(self, input: Tensor, rows: int | None = None) -> Tensor:
        return torch.ops.prefopt.product(input, self.number, sum(self.sizes))  # type: ignore[no-any-return]


@contextmanager
def _in_operations(arena: Compiled) -> Iterator[None]:
    """Within it, the network calls the operations of this module."""
    assert arena.few_rows is not None
    usual = arena.config._attn_implementation
    made = [_Operation(product.layers, i) for i, product in enumerate(arena.few_rows.products)]
    forwards = [(vars(layer), partial(each, i)) for each in made for i, layer in enumerate(each.layers)]
    before = [own["forward"] for own, _ in forwards]
    arena.config._attn_implementation = NAME
    for own, computed in forwards:
        own["forward"] = computed
    try:
        yield
    finally:
        arena.config._attn_implementation = usual
        for (own, _), computed in zip(forwards, before, strict=True):
            own["forward"] = computed


def _shapes(given: List[Tensor | None]) -> tuple[torch.Size | None, ...]:
    return tuple(None if x is None else x.shape for x in given)


def _found(network: nn.Module, source: str) -> Tensor:
    """The tensor of that name."""
    owner, _, name = source.rpartition(".")
    return getattr(network.get_submodule(owner), name).detach()  # type: ignore[no-any-return]


# --- operations -----------------------------------------------------------------------------------------------------


def _product(input: Tensor, number: int, size: int) -> Tensor:
    arena = _arena.get()
    assert arena.few_rows is not None
    found = arena.few_rows.products[number].whole(input, len(arena.once(input)))
    return found if arena.few_rows.heard is None else found.clone()  # compiled code writes where it read


def _product_like(input: Tensor, number: int, size: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], size)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layer: int, scaling: float) -> Tensor:
    """Writes the keys and values of the rows' tokens [n, K, 1, D], and attends to all that there are; [n, 1, H, D]."""
    arena = _arena.get()
    query, key, value, mask = map(arena.once, (query, key, value, mask))
    keys, values = arena.layers[layer].update(key, value)
    asked = Asked(query, keys, values, mask, 0.0, False, scaling)
    step = arena.few_rows.step if arena.few_rows is not None else None
    if step is None or not step.knows(asked):
        raise NotImplementedError("its attention is not that of rows in progress")
    return arena.again(attend(asked, step).transpose(1, 2).contiguous())


def _attention_like(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it, as an operation."""
    if dropout or not usual(more):
        raise NotImplementedError("its attention is of another kind")
    factor = Asked(query, key, value, scale=scaling).factor
    return torch.ops.prefopt.attend(query, key, value, attention_mask, module.layer_idx, factor), None


OPERATIONS.impl("product", _product, "CPU")
OPERATIONS.impl("attend", _attention, "CPU")
torch.library.register_fake("prefopt::product", _product_like, lib=OPERATIONS)
torch.library.register_fake("prefopt::attend", _attention_like, lib=OPERATIONS)
AttentionInterface.register(NAME, _attend)
