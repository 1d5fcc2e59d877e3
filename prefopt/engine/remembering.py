"""An arena whose products are kept. Knows slots, tokens and what a recall hears; no sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from prefopt.engine.fewrows import marks
from prefopt.engine.recall import ROOT, Recall
from prefopt.engine.slots import Slots, parts
from prefopt.sampling import Arena


class Remembering:
    """Implements `prefopt.sampling.Arena` with another whose products it keeps."""

    def __init__(self, arena: Slots, recall: Recall, slots: int) -> None:
        assert arena.few_rows is not None, "such an arena is not heard"
        self.arena, self.recall, self.device = arena, recall, arena.device
        self.matrices = {id(layer.weight) for layer in arena.few_rows.layers}
        """Those whose products steps are computed with."""
        arena.few_rows.heard = recall.heard
        self.trails: list[list[int]] = [[] for _ in range(slots)]
        """The places of the tokens in each slot."""

    def read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        empty = [i for i, prompt in enumerate(prompts) if not prompt]
        for part in filter(None, (*parts(prompts), empty)):
            self._read([prompts[i] for i in part], [slots[i] for i in part])

    def _read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        longest = max(map(len, prompts), default=0)
        real = torch.tensor([[t < len(prompt) for t in range(longest)] for prompt in prompts], dtype=torch.bool)
        with self.recall.hearing(int(real.sum()), real.flatten()) as place, _Listening(self):
            self.arena.read(prompts, slots)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.trails[slot] = []
            for token in prompt:
                self._step(slot, token, place)
                place += 1

    def copy(self, source: int, targets: List[int], length: int) -> None:
        self.arena.copy(source, targets, length)
        for target in targets:
            self.trails[target] = self.trails[source][:length]

    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        with self.recall.hearing(len(tokens)) as place:
            logits = self.arena.advance(tokens, positions, width)
        for slot, (token, position) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            del self.trails[slot][position:]
            self._step(slot, token, place + slot)
        return logits

    def _step(self, slot: int, token: int, fresh: int) -> None:
        trail = self.trails[slot]
        trail.append(self.recall.follow(trail[-1] if trail else ROOT, token, fresh))


class _Listening(TorchFunctionMode):
    """Within it, products of linear layers are heard."""

    def __init__(self, arena: Remembering) -> None:
        super().__init__()
        self.arena = arena

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is linear and len(args) >= 2 and id(args[1]) in self.arena.matrices:
            self.arena.recall.heard(args[1], marks(args[0]), found)
        return found


def remembered(arena: Arena, recall: Recall | None, slots: int) -> Remembering | Arena:
    """The arena, heard by the recall where there is one and that is possible."""
    if recall is None or not isinstance(arena, Slots) or arena.few_rows is None:
        return arena
    return Remembering(arena, recall, slots)
