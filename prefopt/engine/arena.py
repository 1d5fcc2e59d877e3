"""Keys and values of rows in progress, in slots allocated once: no row is moved when another grows, ends or begins.
Where rows of one prompt are treated together, what each row is given after its prompt stands from the same column on.

It knows slots, tokens and positions; which rows there are, and how their tokens are chosen, is the sampler's business.
Whether a model can be advanced this way is found out by comparing a few steps with each row read whole.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, CacheLayerMixin

from prefopt.engine.fewrows import Block, Step, few_rows
from prefopt.engine.forward import masks
from prefopt.engine.probe import WINDOW, narrow
from prefopt.sampling import Arena

READ_TOKENS = 2048
"""Tokens of prompts read in one forward pass, with padding."""
FILLED = 0.75
"""How long each of them is at least, in parts of the longest."""
BLOCK = 64
"""Places made ready at a time."""
SHARED_TOKENS = 512
"""From so many on that need not be read again, rows of one prompt are treated together."""
TOLERANCE = 1e-4
PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (3,), (5, 6, 7, 8), (9, 8, 7, 6, 5, 4, 3, 2, 1))
STEPS = 2 * WINDOW
NOWHERE = 1 << 40
"""A position beyond every row."""


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

    def extend(self, rows: Tensor, columns: Tensor, width: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token into each of the first n slots; a row sees what stands there."""
        self._prepare(width)
        self.keys[rows, :, columns], self.values[rows, :, columns] = keys[:, :, 0], values[:, :, 0]
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]

    def copy(self, source: int, targets: Tensor, columns: slice) -> None:
        for x in (self.keys, self.values):
            x[targets, :, columns] = x[source, :, columns]

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
    """Implements `prefopt.components.Arena` with one cache for all rows, through the model's own attention."""

    def __init__(self, network: Any, slots: int, prompt: int, room: int, fast: bool = True) -> None:
        """`fast` allows what a CPU has for few rows."""
        self.network = network
        self.config = self.network.config.get_text_config()
        vectors = self.network.get_input_embeddings().weight
        self.device, self.dtype = vectors.device, vectors.dtype
        self.layers = [Layer(slots, prompt + room) for _ in range(self.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        self.few_rows = few_rows(self.network, self.device, self.dtype) if fast else None
        self.edge = prompt
        """The column where a row's own tokens begin, if `few_rows`; else they follow its prompt."""
        self.bases = [0] * slots
        """How many tokens stand before them."""
        self.prompts = [(-1 - slot, 0) for slot in range(slots)]
        """Of the prompt at the beginning of each slot: a mark of when it was read, and how many of its tokens still
        stand there."""
        self.marks = 0
        self.worth = SHARED_TOKENS

    @torch.no_grad()
    def read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        for prompt, slot in zip(prompts, slots, strict=True):
            self.prompts[slot], self.bases[slot] = (self.marks, len(prompt)), len(prompt)
            self.marks += 1
        order = sorted((i for i, prompt in enumerate(prompts) if prompt), key=lambda i: len(prompts[i]))
        while order:
            longest = len(prompts[order[-1]])
            least = min(i for i, row in enumerate(order) if len(prompts[row]) >= FILLED * longest)
            first = max(least, len(order) - max(1, READ_TOKENS // longest))
            part, order = order[first:], order[:first]
            self._pass("begin", torch.tensor([slots[i] for i in part], device=self.device))
            ids = pad_sequence([torch.tensor(prompts[i]) for i in part], batch_first=True)
            self.network.base_model(input_ids=ids.to(self.device), past_key_values=self.cache, use_cache=True)

    def copy(self, source: int, targets: List[int], length: int) -> None:
        (mark, size), base = self.prompts[source], self.bases[source]
        for target in targets:
            self.prompts[target], self.bases[target] = (mark, min(size, length)), base
        parts = [slice(length)]
        if self.few_rows:
            parts = [slice(min(length, base)), slice(self.edge, self.edge + length - base)]
        index = torch.tensor(targets, device=self.device)
        for layer in self.layers:
            for part in parts:
                if layer.is_initialized and (part.start or 0) < part.stop:
                    layer.copy(source, index, part)

    @torch.no_grad()
    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        columns, standing = positions, torch.arange(width, device=self.device)
        fast: AbstractContextManager[Any] = nullcontext()
        if self.few_rows:
            known = positions.tolist()
            placed = [self._column(row, position) for row, position in enumerate(known)]
            columns, width = torch.tensor(placed), 1 + max(placed)
            standing = self._standing(len(known), width)
            fast = self.few_rows.of(Step(self._blocks(known, placed), len(known), width))
        self._pass("extend", torch.arange(len(tokens), device=self.device), columns, width)
        with fast:
            out = self.network(
                input_ids=tokens[:, None],
                attention_mask=masks(self.config, partial(_visible, positions, standing)),
                position_ids=positions[:, None],
                past_key_values=self.cache,
                use_cache=True,
            )
        return out.logits[:, 0]  # type: ignore[no-any-return]

    def _column(self, row: int, position: int) -> int:
        """Where a token of a row stands."""
        base = self.bases[row]
        return position if position < base else self.edge - base + position

    def _standing(self, rows: int, width: int) -> Tensor:
        """The position of what stands in each column, [rows, width]; none that is ever reached in those between."""
        column, base = torch.arange(width), torch.tensor(self.bases[:rows])[:, None]
        after = torch.where(column < self.edge, NOWHERE, column - self.edge + base)
        return torch.where(column < base, column, after)

    def _blocks(self, positions: list[int], columns: list[int]) -> list[Block]:
        """What the rows at `positions` see: of rows of one prompt that stand side by side, what they share of it
        together where that is worth it, and what each has for itself. What a row is given from its position on is its
        own."""
        for row, position in enumerate(positions):
            mark, size = self.prompts[row]
            self.prompts[row] = mark, min(size, position)
        own: list[Block] = []
        together: list[Block] = []
        for _, group in groupby(range(len(positions)), key=lambda row: self.prompts[row][0]):
            rows = list(group)
            size = min(self.prompts[row][1] for row in rows)
            shared = size if (len(rows) - 1) * size >= self.worth else 0
            whole = shared and all(self.bases[row] == shared for row in rows)
            block = Block(rows[0], rows[-1] + 1, self.edge if whole else shared, 1 + max(columns[row] for row in rows))
            if shared:
                together.append(Block(block.first, block.end, 0, shared, together=True))
            if own and own[-1].start == block.start:
                last = own.pop()
                block = Block(last.first, block.end, block.start, max(last.stop, block.stop))
            own.append(block)
        return own + together

    def _pass(self, name: str, *arguments: Any) -> None:
        for layer in self.layers:
            layer.way = name, arguments


def _visible(positions: Tensor, standing: Tensor, window: int | None) -> Tensor:
    """What rows at `positions` [n] may see of columns with tokens of positions `standing`, [width] or [n, width];
    [n, 1, 1, width].

    >>> _visible(torch.tensor([1, 3]), torch.arange(4), 2).int().view(2, 4)
    tensor([[1, 1, 0, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    behind = positions[:, None] - standing
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return seen[:, None, None]


class Apart:
    """Implements `prefopt.components.Arena` for every model: each row with a cache of its own, whatever that is."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.device = self.network.get_input_embeddings().weight.device
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.caches: dict[int, Any] = {}
        self.logits: dict[int, Tensor] = {}

    def read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        for prompt, slot in zip(prompts, slots, strict=True):
            self.tokens[slot], self.caches[slot] = (), None
            if prompt:
                self._feed(slot, prompt)

    def copy(self, source: int, targets: List[int], length: int) -> None:
        self.read([self.tokens[source][:length]] * len(targets), targets)

    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        for slot, (token, position) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            if position == len(self.tokens[slot]):
                self._feed(slot, (token,))
        return torch.stack([self.logits[slot] for slot in range(len(tokens))])

    @torch.no_grad()
    def _feed(self, slot: int, tokens: tuple[int, ...]) -> None:
        ids = torch.tensor([tokens], device=self.device)
        out = self.network(input_ids=ids, past_key_values=self.caches[slot], use_cache=True)
        self.tokens[slot] += tokens
        self.caches[slot], self.logits[slot] = out.past_key_values, out.logits[0, -1]


_fast: WeakKeyDictionary[nn.Module, bool | None] = WeakKeyDictionary()
"""Of each network whether its slots may be fast; None where slots do not hold."""


def arena(network: nn.Module, slots: int, prompt: int, room: int, warn: Callable[[str], None]) -> Arena:
    """The fastest arena whose steps give what the network gives for each row read whole. `warn` hears once why it is
    a slower one."""
    if network not in _fast:
        _fast[network] = _probed(network, warn)
    fast = _fast[network]
    return Apart(network) if fast is None else Slots(network, slots, prompt, room, fast)


def _probed(network: nn.Module, warn: Callable[[str], None]) -> bool | None:
    reason = disagreement(network)
    if reason is None:
        return True
    if disagreement(network, fast=False) is None:
        warn(f"rows are drawn without the shortcuts for few rows, which do not hold for this model: {reason}")
        return False
    warn(f"rows are drawn one by one: keys and values of many do not hold for this model: {reason}")
    return None


def disagreement(network: Any, fast: bool = True) -> str | None:
    """Why rows of different lengths in slots, one of them forked and one moved, give other logits than each read
    whole; None where they do not. A sliding window is narrowed meanwhile, so that rows reach beyond it."""
    try:
        with narrow(network.config.get_text_config()):
            found, expected = _stepped(network, fast), _whole(network)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
    known = expected.isfinite()  # a word may be ruled out by a logit of minus infinity
    if not torch.equal(found[~known], expected[~known]):
        return "infinite logits differ"
    off = float((found - expected)[known].abs().amax() / (1 + expected[known].abs().amax()))
    return None if off <= TOLERANCE else f"they differ by {off:.1g}"


def _prompts(network: Any) -> list[tuple[int, ...]]:
    """The prompts of the probe, in tokens that the model has."""
    size = network.get_input_embeddings().weight.shape[0]
    return [tuple(token % size for token in prompt) for prompt in PROMPTS]


def _rows(network: Any) -> list[tuple[int, ...]]:
    """Each prompt of the probe with the tokens that follow; the first is there twice, forked."""
    size, prompts = network.get_input_embeddings().weight.shape[0], _prompts(network)
    tails = [tuple((2 + (7 * i + 3 * k) % 9) % size for k in range(STEPS)) for i in range(len(prompts) + 1)]
    return [(*prompt, *tail) for prompt, tail in zip([prompts[0], *prompts], tails, strict=True)]


def _stepped(network: Any, fast: bool) -> Tensor:
    """The logits of each step, [rows, STEPS, V]."""
    prompts, rows = _prompts(network), _rows(network)
    starts = [len(prompt) for prompt in (prompts[0], *prompts)]
    last = len(rows) - 1
    slots = Slots(network, len(rows) + 1, max(starts), STEPS, fast)
    slots.worth = 1
    slots.read([prompts[1], prompts[1]], [1, last])  # as when a slot is used again
    slots.read(prompts, [last + 1, *range(2, last + 1)])
    slots.copy(last + 1, [0, 1], starts[0])
    steps = []
    for k in range(STEPS):
        places = torch.tensor([start + k for start in starts], device=slots.device)
        tokens = torch.tensor([row[start + k] for row, start in zip(rows, starts, strict=True)], device=slots.device)
        steps.append(slots.advance(tokens, places, int(places.max()) + 1))
    return torch.stack(steps, 1)


@torch.no_grad()
def _whole(network: Any) -> Tensor:
    device = network.get_input_embeddings().weight.device
    each = [
        network(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0, -STEPS:]
        for row in _rows(network)
    ]
    return torch.stack(each)
