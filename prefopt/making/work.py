"""Work on many rows: the usable ones, some at a time, and how far it has come. Knows not what is done to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass

from prefopt.components import Services
from prefopt.config.models import RowsConfig
from prefopt.data.check import Policy, Reject, screened
from prefopt.errors import ConfigError
from prefopt.rows import Row

Say = Callable[[str], None]


def rows_of(config: RowsConfig | None, services: Services, where: str) -> tuple[List[Row], list[Reject]]:
    """The usable rows, and the rest with reasons. Raises `ConfigError` where no source is named, `DataError` where too
    many rows are bad."""
    if config is None:
        raise ConfigError("no rows are named", where=where, fix="Name a data source.")
    policy = Policy(config.on_bad_row == "drop", config.max_bad_rows or 0.05)
    return screened(config.source.open(services), policy)


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
