"""The reward of both sides where a method samples: trivial, so that nobody waits for it. Knows texts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def letters(prompt: Any, completions: Sequence[str], row: Any) -> list[float]:
    """How often each completion has the letter e, in tens."""
    return [text.count("e") / 10 for text in completions]
