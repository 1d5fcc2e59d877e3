"""Looks at every row of a source once, and says which cannot be used and why. What to do about them is policy: stop, or
drop them up to a cap; either way all of them are counted and none disappears in silence."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from prefopt.data.read import BadRow, shortened
from prefopt.data.source import Rows, remarks
from prefopt.errors import DataError, Problem, redact
from prefopt.rows import Row


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used."""

    index: int
    sort: str
    problem: Problem

    def line(self) -> str:
        """As a line of a rejects file."""
        facts: dict[str, Any] = {"row": self.index, "where": self.problem.where}
        return json.dumps(redact({**facts, "class": self.sort, "reason": self.problem.what}), ensure_ascii=True) + "\n"


@dataclass
class Report:
    """What looking at every row found. `good` are the indices of usable rows."""

    total: int = 0
    good: array[int] = field(default_factory=lambda: array("q"))
    rejects: list[Reject] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)

    def by_sort(self) -> dict[str, list[Reject]]:
        """The bad rows of each class, the largest class first."""
        sorts: dict[str, list[Reject]] = {}
        for reject in self.rejects:
            sorts.setdefault(reject.sort, []).append(reject)
        return dict(sorted(sorts.items(), key=lambda item: -len(item[1])))

    @property
    def problems(self) -> list[Problem]:
        return [reject.problem for reject in self.rejects]


def examine(rows: List[Row], odd: bool = True) -> Report:
    """Reads every row once. With `odd`, what is odd and yet no error is counted as well."""
    report = Report(len(rows))
    read = rows.read if isinstance(rows, Rows) else rows.__getitem__
    for i in range(len(rows)):
        try:
            row = read(i)
            report.good.append(i)
            for remark in remarks(row) if odd else ():
                report.remarks[remark] += 1
        except BadRow as error:
            report.rejects.append(Reject(i, error.sort, error.problems[0]))
    return report


class Kept(List[Row]):
    """Some rows of a source, by their new number."""

    def __init__(self, rows: List[Row], kept: array[int]) -> None:
        self.rows, self.kept = rows, kept

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> List[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | List[Row]:
        if isinstance(index, slice):
            return [self.rows[i] for i in self.kept[index]]
        return self.rows[self.kept[index]]


def place(rows: List[Row], index: int) -> str:
    """Where a row came from, as well as is known."""
    if isinstance(rows, Kept):
        return place(rows.rows, rows.kept[index])
    return f"row {index}, {rows.where(index)}" if isinstance(rows, Rows) else f"row {index}"


@dataclass(frozen=True, slots=True)
class Policy:
    """What to do about bad rows: stop, or drop at most `most` of them (a number, or a share below 1)."""

    drop: bool = False
    most: float = 0.05

    def check(self, bad: List[Problem], total: int) -> None:
        """Raises `DataError` with every bad row, unless they may be dropped."""
        if not bad or (self.drop and len(bad) <= self._cap(total) and len(bad) < total):
            return
        problems = shortened(list(bad))
        if self.drop:
            cap = f"{self.most:g}" if self.most >= 1 else f"{self.most:.1%} of them"
            many = f"{len(bad):,} of {total:,} rows are bad, and data.max_bad_rows allows {cap}"
            problems.insert(0, Problem(many, fix="Mend the rows, or allow more."))
        raise DataError(*problems)

    def _cap(self, total: int) -> float:
        return self.most if self.most >= 1 else self.most * total


def screened(rows: List[Row], policy: Policy) -> tuple[List[Row], list[Reject]]:
    """The usable rows, and the rest with reasons. Rows that a source has made itself are taken as they are."""
    if not isinstance(rows, Rows):
        return rows, []
    report = examine(rows, odd=False)
    policy.check(report.problems, report.total)
    return (Kept(rows, report.good) if report.rejects else rows), report.rejects


def write_rejects(path: Path, rejects: List[Reject]) -> None:
    """All of them, one on each line; no file when there are none."""
    if rejects:
        path.write_text("".join(_lines(rejects)), "utf-8")


def _lines(rejects: List[Reject]) -> Iterator[str]:
    return (reject.line() for reject in rejects)
