"""Keys and values of rows in progress where many rows begin with the same prompt: each prompt stands there once, and a
row has for itself what was drawn for it. On a CPU, with attention of its own."""

from __future__ import annotations

from collections.abc import Sequence as List
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefopt.engine.fewrows import Step, able
from prefopt.engine.pages import PAGE, Sharing
from prefopt.engine.slots import Columns, Layer, Rows, Slots, parts

NOWHERE = 1 << 40
"""A position beyond every row."""


class SharedLayer(Layer):
    """`keys` and `values` are those of the rows' own tokens, [slots, heads, room, size]; `prompts` those on the pages
    of prompts, [pages, heads, size, PAGE] and [pages, heads, PAGE, size]."""

    def __init__(self, slots: int, room: int) -> None:
        super().__init__(slots, room)
        self.prompts: list[Tensor] = []

    def begin(  # type: ignore[override]
        self, pages: Tensor, which: Tensor, end: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prompts [n, heads, T, size] onto pages, of which there are `end`; of PAGE tokens each, counted over all
        prompts, `which` go there. A prompt sees itself alone."""
        new = _cut(keys)[which].transpose(2, 3), _cut(values)[which]
        self.prompts = [_grown(old, end) for old in self.prompts or [x[:0] for x in new]]
        for prompts, x in zip(self.prompts, new, strict=True):
            prompts[pages] = x
        return keys, values

    def extend(  # type: ignore[override]
        self, rows: Rows, columns: Columns, width: int, step: Step, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        step.prompts = self.prompts
        return super().extend(rows, columns, width, keys, values)

    def swap(self, some: List[int], others: List[int]) -> None:
        for x in self.prompts:
            x[[*some, *others]] = x[[*others, *some]]


def _cut(x: Tensor) -> Tensor:
    """[n, heads, T, size] in pieces of PAGE tokens, the last ones filled with 0, [n * pieces, heads, PAGE, size]."""
    n, heads, tokens, size = x.shape
    filled = pad(x, (0, 0, 0, -tokens % PAGE)).view(n, heads, -1, PAGE, size)
    return filled.transpose(1, 2).flatten(0, 1)


def _grown(old: Tensor, size: int) -> Tensor:
    """That many pages or more, with what stands on those there are."""
    if len(old) >= size:
        return old
    new = old.new_zeros(max(size, 3 * len(old) // 2), *old.shape[1:])
    new[: len(old)] = old
    return new


class Shared(Slots):
    """Implements `prefopt.sampling.Arena` with each prompt in one place, whatever number of rows begin with it."""

    def __init__(self, network: Any, slots: int, prompt: int, room: int, whole: int | None = None) -> None:
        super().__init__(network, slots, prompt, room, whole)
        self.pages: list[tuple[int, ...]] = [()] * slots
        """Where the prompt of each slot stands."""
        self.size = [0] * slots
        """How many of its tokens the slot begins with."""
        self.sharing: Sharing | None = None
        """Of the rows of the last step."""

    @staticmethod
    def serves(network: Any) -> bool:
        """Whether this can be for the network."""
        return able(network) and network.config.get_text_config()._attn_implementation == "sdpa"

    def _layer(self, slots: int, prompt: int, room: int, whole: int | None) -> Layer:
        return SharedLayer(slots, room)

    @torch.no_grad()
    def read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        for slot, prompt in zip(slots, prompts, strict=True):
            self.pages[slot], self.size[slot] = (), len(prompt)
        taken = set(chain(*self.pages))
        free = (page for page in count() if page not in taken)
        for slot in slots:
            self.pages[slot] = tuple(islice(free, _pages_of(self.size[slot])))
        end = 1 + max(chain(*self.pages), default=-1)
        for part in parts(prompts):
            numbers = [self.pages[slots[i]] for i in part]
            most = max(map(len, numbers))
            which = [i * most + k for i, pages in enumerate(numbers) for k in range(len(pages))]
            self._read([prompts[i] for i in part], torch.tensor([*chain(*numbers)]), torch.tensor(which), end)

    def copy(self, source: int, targets: List[int], length: int) -> None:
        for target in targets:
            self.pages[target], self.size[target] = self.pages[source], self.size[source]
            self._cut(target, length)
        super().copy(source, targets, length - min(self.size[source], length))

    @torch.no_grad()
    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        known = positions.tolist()
        for slot, position in enumerate(known):
            self._cut(slot, position)
        sizes = self.size[: len(known)]
        columns = [position - size for position, size in zip(known, sizes, strict=True)]
        step = Step(self._gathered(len(known)), [column + 1 for column in columns])
        self._pass("extend", *_target(columns), step.width, step)
        assert self.few_rows is not None
        with self.few_rows.of(step):
            return self._logits(tokens, positions, _standing(torch.tensor(sizes), step.longest, step.width))

    def _cut(self, slot: int, length: int) -> None:
        """The slot begins with no more than so many tokens of its prompt."""
        if length < self.size[slot]:
            self.pages[slot], self.size[slot] = self.pages[slot][: _pages_of(length)], length

    def _gathered(self, rows: int) -> Sharing:
        """The pages of these rows, moved to the first ones where less than half of those up to the last are theirs."""
        if self.sharing is None or self.pages[:rows] != self.sharing.rows:
            used = set(chain(*self.pages[:rows]))
            if 2 * len(used) <= max(used, default=-1):
                self._move([*used])
            self.sharing = Sharing(self.pages[:rows])
        return self.sharing

    def _move(self, used: list[int]) -> None:
        """These pages to the first ones."""
        gaps = sorted({*range(len(used))} - {*used})
        late = sorted(page for page in used if page >= len(used))
        for layer in self.layers:
            layer.swap(late, gaps)
        moved = dict(zip([*late, *gaps], [*gaps, *late], strict=True))
        self.pages = [tuple(moved.get(page, page) for page in numbers) for numbers in self.pages]


def _pages_of(size: int) -> int:
    """How many so many tokens take."""
    return -(-size // PAGE)


def _target(columns: List[int]) -> tuple[Rows, Columns]:
    """Where each row's token goes, as slices where all have the same column, which is faster."""
    if len(set(columns)) == 1:
        return slice(len(columns)), columns[0]
    return torch.arange(len(columns)), torch.tensor(columns)


def _standing(sizes: Tensor, longest: int, width: int) -> Tensor:
    """The position of the token in each column, those of the prompts [n, longest] and then those of the rows' own
    tokens [n, width].

    >>> _standing(torch.tensor([3, 2]), 3, 2).clamp(max=9)
    tensor([[0, 1, 2, 3, 4],
            [0, 1, 9, 2, 3]])
    """
    prompt, own = torch.arange(longest).expand(len(sizes), -1), torch.arange(width)
    return torch.cat([prompt.masked_fill(prompt >= sizes[:, None], NOWHERE), sizes[:, None] + own], 1)
