"""Rows become pairs, pairs become verdicts, a batch at a time. Knows rows and judges; no report and no label file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.components import Scorer, Services, TextModel
from prefopt.config.judging import JudgingConfig
from prefopt.config.models import RowsConfig
from prefopt.data.check import Policy, Reject, screened
from prefopt.data.streams import derive, generator
from prefopt.errors import ConfigError
from prefopt.rows import Row, show_text
from prefopt.verdicts import Comparer, Pair, Verdict, answered

if TYPE_CHECKING:
    import numpy as np

Say = Callable[[str], None]


@dataclass(frozen=True)
class JudgeServices:
    """Implements `prefopt.components.Services` without loading torch before a model is asked for."""

    seed: int
    folder: Path

    def rng(self, *purpose: str | int) -> np.random.Generator:
        return generator(self.seed, "component", *purpose)

    def kept(self, name: str) -> Path:
        return self.folder / name

    def scorer(self, path: str) -> Scorer:
        return self._engine.scorer(path)

    def language_model(self, path: str) -> TextModel:
        return self._engine.language_model(path)

    @cached_property
    def _engine(self) -> Services:
        from prefopt.engine.services import EngineServices

        return EngineServices(self.seed, folder=self.folder)


def services_of(config: JudgingConfig) -> JudgeServices:
    """What judges may ask for; replies are kept in the folder of the output."""
    return JudgeServices(config.seed, Path(config.out))


def rows_of(config: RowsConfig | None, services: Services, where: str) -> tuple[List[Row], list[Reject]]:
    """The usable rows, and the rest with reasons. Raises `ConfigError` where no source is named, `DataError` where too
    many rows are bad."""
    if config is None:
        raise ConfigError("no rows are named", where=where, fix="Name a data source.")
    policy = Policy(config.on_bad_row == "drop", config.max_bad_rows or 0.05)
    return screened(config.source.open(services), policy)


def in_drawn_order(compare: Comparer, seed: int) -> Comparer:
    """The judge asked about each pair in one order, which its texts and the seed decide."""

    def asked(pairs: List[Pair]) -> list[Verdict]:
        turned = [derive(seed, "order", show_text(p.prompt), p.a.text, p.b.text) % 2 == 1 for p in pairs]
        found = answered(compare, [p.turned() if t else p for p, t in zip(pairs, turned, strict=True)])
        return [v.turned() if t else v for v, t in zip(found, turned, strict=True)]

    return asked


@dataclass
class Clock:
    """Says how far a piece of work has come, at most once a second, and how long the rest will take."""

    total: int
    unit: str
    say: Say
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.began = self.last = self.now()

    def tick(self, done: int, more: str = "") -> None:
        """So many units are done."""
        now = self.now()
        if now - self.last < 1 and done < self.total:
            return
        self.last = now
        left = (now - self.began) / max(done, 1) * (self.total - done)
        rest = f", about {left:.0f} s left" if done < self.total else f" in {now - self.began:.0f} s"
        self.say(f"{done:,} of {self.total:,} {self.unit}{more}{rest}")


def batches(sizes: List[int], most: int) -> Iterator[range]:
    """Runs of items whose sizes add up to at most `most`, or that are one item.

    >>> list(batches([2, 2, 5, 1], 4))
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            yield range(start, i)
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))
