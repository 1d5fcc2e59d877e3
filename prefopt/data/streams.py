"""Randomness by name, and the order of the data. Both are pure functions: there is no state to save but one integer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from prefopt.lazy import lazy_import

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy_import("numpy")


def derive(*names: str | int) -> int:
    """A 63-bit key for a named purpose: the same on every machine, unrelated for different names.

    >>> derive(0, "order", 1) == derive(0, "order", 1), derive(0, "order", 1) == derive(0, "order", 2)
    (True, False)
    """
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*names: str | int) -> np.random.Generator:
    """A random generator that depends on `names` alone (Philox, a counter-based generator)."""
    return np.random.Generator(np.random.Philox(key=derive(*names)))


@lru_cache(maxsize=4)
def _permutation(size: int, *names: str | int) -> np.ndarray:
    return generator(*names).permutation(size)


@dataclass(frozen=True)
class Order:
    """Which rows each step sees: every epoch a new permutation of `rows`, the last step of an epoch may be smaller."""

    rows: Sequence[int]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def step(self, step: int) -> list[int]:
        """The row indices of global step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(len(self.rows), self.seed, "order", epoch)
        return [self.rows[i] for i in order[place * self.batch_size : (place + 1) * self.batch_size]]


def split(size: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, both in the order of the data."""
    order = _permutation(size, seed, "holdout")
    return sorted(map(int, order[held_out:])), sorted(map(int, order[:held_out]))
