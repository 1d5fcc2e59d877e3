"""Keys and values of rows in progress where many rows begin with the same prompt: each prompt stands there once, and a
row has for itself what was drawn for it. On a CPU, with attention of its own."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Any

import torch
from torch import Tensor

from prefopt.engine.fewrows import Step, able
from prefopt.engine.slots import Columns, Layer, Rows, Slots, parts

NOWHERE = 1 << 40
"""A position beyond every row."""


class SharedLayer(Layer):
    """`keys` and `values` are those of the rows' own tokens, [slots, heads, room, size]; `prompts` those of prompts,
    [places, heads, longest, size] each."""

    def __init__(self, slots: int, prompt: int, room: int) -> None:
        super().__init__(slots, room)
        self.longest, self.places = prompt, 0
        self.prompts: list[Tensor] = []

    def begin(self, places: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [n, heads, T, size] into their places; a prompt sees itself alone."""
        size = keys.shape[2]
        olds = self.prompts or [keys[:0], values[:0]]
        self.prompts = [self._grown(old, x) for old, x in zip(olds, (keys, values), strict=True)]
        for prompts, x in zip(self.prompts, (keys, values), strict=True):
            prompts[places, :, :size], prompts[places, :, size:] = x, 0
        return keys, values

    def _grown(self, old: Tensor, like: Tensor) -> Tensor:
        """As many places as were asked for, with what stands in those there are."""
        if len(old) >= self.places:
            return old
        new = like.new_zeros(self.places, like.shape[1], self.longest, like.shape[3])
        if len(old):
            new[: len(old)] = old
        return new

    def extend(  # type: ignore[override]
        self, rows: Rows, columns: Columns, width: int, step: Step, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        step.prompts = self.prompts
        return super().extend(rows, columns, width, keys, values)

    def swap(self, one: int, other: int) -> None:
        for x in self.prompts:
            x[[one, other]] = x[[other, one]]


class Shared(Slots):
    """Implements `prefopt.sampling.Arena` with each prompt in one place, whatever number of rows begin with it."""

    def __init__(self, network: Any, slots: int, prompt: int, room: int, whole: int | None = None) -> None:
        super().__init__(network, slots, prompt, room, whole)
        self.place = [-1] * slots
        """Where the prompt of each slot stands, none for an empty one."""
        self.size = [0] * slots
        """How many of its tokens the slot begins with."""

    @staticmethod
    def serves(network: Any) -> bool:
        """Whether this can be for the network."""
        return able(network) and network.config.get_text_config()._attn_implementation == "sdpa"

    def _layer(self, slots: int, prompt: int, room: int, whole: int | None) -> Layer:
        return SharedLayer(slots, prompt, room)

    @torch.no_grad()
    def read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        for slot, prompt in zip(slots, prompts, strict=True):
            self.place[slot], self.size[slot] = -1, len(prompt)
        taken = set(self.place)
        free = (place for place in range(len(self.place)) if place not in taken)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.place[slot] = next(free) if prompt else -1
        for layer in self.layers:
            layer.places = 1 + max(self.place)
        for part in parts(prompts):
            self._read([prompts[i] for i in part], torch.tensor([self.place[slots[i]] for i in part]))

    def copy(self, source: int, targets: List[int], length: int) -> None:
        size = min(self.size[source], length)
        for target in targets:
            self.place[target], self.size[target] = self.place[source], size
        super().copy(source, targets, length - size)

    @torch.no_grad()
    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        known = positions.tolist()
        self.size[: len(known)] = [min(pair) for pair in zip(self.size, known, strict=False)]
        self._gather(len(known))
        sizes = self.size[: len(known)]
        columns = [position - size for position, size in zip(known, sizes, strict=True)]
        step = Step(self.place[: len(known)], max(sizes), 1 + max(columns))
        self._pass("extend", *_target(columns), step.width, step)
        assert self.few_rows is not None
        with self.few_rows.of(step):
            return self._logits(tokens, positions, _standing(torch.tensor(sizes), step.longest, step.width))

    def _gather(self, rows: int) -> None:
        """Moves prompts of these rows to the first places where less than half of the places before the last are
        theirs."""
        used = {place for place in self.place[:rows] if place >= 0}
        if 2 * len(used) > max(used, default=0):
            return
        gaps = (place for place in range(len(used)) if place not in used)
        for one, other in zip(sorted(place for place in used if place >= len(used)), gaps, strict=True):
            for layer in self.layers:
                layer.swap(one, other)
            self.place = [{one: other, other: one}.get(place, place) for place in self.place]


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
