"""Between a model and a sampler: what is asked for, what a sampler sees of a model, and what it gives back. Shapes of
calls alone; nothing here computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prefopt.rows import Completion

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to draw: the prompt's tokens, and the key its random numbers derive from; a `greedy` one takes the
    most probable token each time."""

    prompt: tuple[int, ...]
    key: int
    greedy: bool = False


class LanguageModel(Protocol):
    """What a sampler sees of a model."""

    @property
    def network(self) -> torch.nn.Module:
        """Called as `network(input_ids=..., past_key_values=..., use_cache=True)`."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a completion."""

    @property
    def positions(self) -> int | None:
        """The most tokens it can read, prompt and completion together; None when it sets no limit."""

    def decode(self, ids: List[int]) -> str:
        """The text of completion tokens, without special tokens."""

    def export(self, folder: Path) -> None:
        """Writes it to a new folder, as `from_pretrained` and servers read it: weights as safetensors, adapters merged
        into them, and the tokenizer."""

    def arena(self, slots: int, prompt: int, room: int, whole: int | None = None) -> Arena:
        """Space for `slots` rows of at most `prompt` tokens to begin with and `room` more, `whole` together (their sum
        unless it is less)."""


class Arena(Protocol):
    """What a model has read of rows that go on, one in each slot: its keys and values."""

    def read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        """Reads each prompt from the beginning of its slot. What the slot held is lost."""

    def copy(self, source: int, targets: List[int], length: int) -> None:
        """Puts the first `length` tokens of a slot into others."""

    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """Reads one token more in each of the first n slots, behind what stands before its position. `tokens` and
        `positions` [n], all of these below `width`. The logits after it, [n, V]."""


Drawer = Callable[[List[Request]], Iterable[tuple[int, Completion]]]
"""Draws one completion for each request and gives them as they are finished, each with the place of its request. Their
order must not depend on time."""
