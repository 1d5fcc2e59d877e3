"""Keys and values of rows in progress, in slots allocated once: no row is moved when another grows, ends or begins.

It knows slots, tokens and positions; which rows there are, and how their tokens are chosen, is the sampler's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, CacheLayerMixin

from prefopt.engine.fewrows import FewRows, able
from prefopt.engine.forward import masks

READ_TOKENS = 2048
"""Tokens of prompts read in one forward pass, with padding."""
FILLED = 0.75
"""How long each of them is at least, in parts of the longest."""
BLOCK = 64
"""Places made ready at a time."""
Rows: TypeAlias = Tensor | slice
Columns: TypeAlias = Tensor | int


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, [slots, heads, capacity, size]. What a forward pass does with them is set before it:
    read prompts, or advance rows by a token."""

    is_sliding = False

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__()
        self.slots, self.capacity, self.ready = slots, capacity, 0
        self.way: tuple[str, tuple[Any, ...]] = "", ()
        """The method that takes keys and values, and what it is told besides. Not the method itself: a layer that holds
        itself would keep its memory until Python looks for cycles."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            x.new_empty(self.slots, x.shape[1], self.capacity, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        name, told = self.way
        return getattr(self, name)(*told, key_states, value_states)  # type: ignore[no-any-return]

    def begin(self, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [n, heads, T, size] into their slots; a prompt sees itself alone."""
        size = keys.shape[2]
        self._prepare(size)
        self.keys[slots, :, :size], self.values[slots, :, :size] = keys, values
        return keys, values

    def extend(self, rows: Rows, columns: Columns, width: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token into each of the first n slots; a row sees what stands there."""
        self._prepare(width)
        self.keys[rows, :, columns], self.values[rows, :, columns] = keys[:, :, 0], values[:, :, 0]
        return self.keys[: len(keys), :, :width], self.values[: len(keys), :, :width]

    def copy(self, source: int, targets: Tensor, length: int) -> None:
        for x in (self.keys, self.values):
            x[targets, :, :length] = x[source, :, :length]

    def _prepare(self, width: int) -> None:
        """Numbers must stand where a mask hides them: 0 times what memory happens to hold may be no number."""
        if width > self.ready:
            end = min(self.capacity, -(-width // BLOCK) * BLOCK)
            for x in (self.keys, self.values):
                x[:, :, self.ready : end] = 0
            self.ready = end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.capacity


class Slots:
    """Implements `prefopt.sampling.Arena` with one cache for all rows, through the model's own attention."""

    def __init__(
        self, network: Any, slots: int, prompt: int, room: int, whole: int | None = None, fast: bool = True
    ) -> None:
        """`fast` allows what a CPU has for products of few rows."""
        self.network = network
        self.config = self.network.config.get_text_config()
        self.device = self.network.get_input_embeddings().weight.device
        self.layers: list[Any] = [self._layer(slots, prompt, room, whole) for _ in range(self.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        self.few_rows = FewRows(network) if fast and able(network) else None

    def _layer(self, slots: int, prompt: int, room: int, whole: int | None) -> Layer:
        return Layer(slots, prompt + room if whole is None else whole)

    @torch.no_grad()
    def read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        for part in parts(prompts):
            self._read([prompts[i] for i in part], torch.tensor([slots[i] for i in part], device=self.device))

    def _read(self, prompts: List[tuple[int, ...]], *told: Any) -> None:
        """One forward pass over prompts, whose keys and values go where layers are `told`."""
        self._pass("begin", *told)
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        self.network.base_model(input_ids=ids.to(self.device), past_key_values=self.cache, use_cache=True)

    def copy(self, source: int, targets: List[int], length: int) -> None:
        index = torch.tensor(targets, device=self.device)
        for layer in self.layers:
            if length and layer.is_initialized:
                layer.copy(source, index, length)

    @torch.no_grad()
    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        self._pass("extend", torch.arange(len(tokens), device=self.device), positions, width)
        with self.few_rows or nullcontext():
            return self._logits(tokens, positions, torch.arange(width, device=self.device))

    def _logits(self, tokens: Tensor, positions: Tensor, standing: Tensor) -> Tensor:
        """The logits after one token of each row, which sees columns with tokens of positions `standing`. [n, V]"""
        seen = masks(self.config, partial(visible, positions, standing))
        return self._forward(tokens[:, None], seen, positions[:, None])

    def _forward(self, ids: Tensor, seen: Tensor | dict[str, Tensor], positions: Tensor) -> Tensor:
        """The logits [n, V] after `ids` [n, 1] at `positions` [n, 1]."""
        return forward(self.network, self.cache, ids, seen, positions)

    def _pass(self, name: str, *arguments: Any) -> None:
        for layer in self.layers:
            layer.way = name, arguments


def forward(network: Any, cache: Cache, ids: Tensor, seen: Tensor | dict[str, Tensor], positions: Tensor) -> Tensor:
    """The logits [n, V] after `ids` [n, 1] at `positions` [n, 1], under the mask or masks `seen` [n, 1, 1, width]."""
    told = {"input_ids": ids, "attention_mask": seen, "position_ids": positions}
    return network(**told, past_key_values=cache, use_cache=True).logits[:, 0]  # type: ignore[no-any-return]


def parts(prompts: List[tuple[int, ...]]) -> Iterator[list[int]]:
    """Which prompts are read in one forward pass: such of about the same length, and none that are empty."""
    order = sorted((i for i, prompt in enumerate(prompts) if prompt), key=lambda i: len(prompts[i]))
    while order:
        longest = len(prompts[order[-1]])
        least = min(i for i, row in enumerate(order) if len(prompts[row]) >= FILLED * longest)
        first = max(least, len(order) - max(1, READ_TOKENS // longest))
        part, order = order[first:], order[:first]
        yield part


def visible(positions: Tensor, standing: Tensor, window: int | None) -> Tensor:
    """What rows at `positions` [n] may see of columns with tokens of positions `standing`, [width] or [n, width];
    [n, 1, 1, width].

    >>> visible(torch.tensor([1, 3]), torch.arange(4), 2).int().view(2, 4)
    tensor([[1, 1, 0, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    behind = positions[:, None] - standing
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return seen[:, None, None]
