"""Verdicts that somebody recorded, as a judge. A pair is found by its texts, whatever the order they come in."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field

from prefopt.api import Comparer, DataError, Judge, Pair, Services, UserPath, Verdict, show_text
from prefopt_judges.texts import key_of

Column: TypeAlias = str | list[str]
Said: TypeAlias = Literal["a", "b", "tie"]
Value: TypeAlias = str | int | float | bool
SIDES: Mapping[str, tuple[float, float]] = {"a": (1.0, 0.0), "b": (0.0, 0.0), "tie": (0.0, 1.0)}


class Replay(Judge):
    """Verdicts recorded in a file: a JSON list, or JSONL, plain or gzipped."""

    name = "replay"

    path: UserPath
    """The file."""
    columns: dict[Literal["prompt", "a", "b", "verdict", "swapped"], Column] = Field({})
    """What the file calls `prompt`, `a`, `b`, the `verdict`, and `swapped`: the verdict when b was shown first, in
    terms of a and b too. A column, a dotted path into it, or several, which are joined. Without `swapped` the judge was
    asked in one order, and says the same in the other: nothing can then be said about its position bias."""
    labels: dict[Said, Value | list[Value]] = Field({})
    """Which values stand for `a`, `b` and `tie`. What none stands for is a missing verdict."""
    texts: UserPath | None = None
    """Another file with the texts of the same records, where `path` has the verdicts alone."""
    joined_by: str = "idx"
    """The column both files share, with `texts`."""

    def open(self, services: Services) -> Comparer:
        """Raises `DataError` when the files cannot be read as described."""
        known = {record.name: record for record in reversed(list(self._records()))}
        return lambda pairs: [_said(known.get(_name(p.prompt, p.a.text, p.b.text)), p) for p in pairs]

    def _records(self) -> Iterator[Recorded]:
        texts = {row.get(self.joined_by): row for row in _read(self.texts)} if self.texts is not None else None
        for i, row in enumerate(_read(self.path)):
            whole = row if texts is None else {**texts.get(row.get(self.joined_by), {}), **row}
            try:
                yield self._record(whole)
            except (KeyError, IndexError, ValueError, TypeError) as error:
                what = f"a record does not have the columns named: {error!r}"
                raise DataError(what, where=f"{self.path}, row {i}", fix="Name them with `columns`.") from None

    def _record(self, row: Mapping[str, Any]) -> Recorded:
        prompt, a, b = (self._text(row, name) for name in ("prompt", "a", "b"))
        first = self._verdict(_picked(row, self._called("verdict")))
        other = self._verdict(_picked(row, self._called("swapped"))) if "swapped" in self.columns else first
        return Recorded(_name(prompt, a, b), a, first, other)

    def _called(self, name: Literal["prompt", "a", "b", "verdict", "swapped"]) -> str:
        found = self.columns.get(name, name)
        return found if isinstance(found, str) else found[0]

    def _text(self, row: Mapping[str, Any], name: Literal["prompt", "a", "b"]) -> str:
        found = self.columns.get(name, name)
        parts = [_picked(row, path) for path in ([found] if isinstance(found, str) else found)]
        return "\n".join(str(part) for part in parts if part)

    def _verdict(self, said: Any) -> Verdict:
        for side, values in self.labels.items():
            listed = values if isinstance(values, list) else [values]
            if any(type(v) is type(said) and v == said for v in listed):
                return Verdict(*SIDES[side])
        if not self.labels and said in SIDES:
            return Verdict(*SIDES[said])
        return Verdict(None, reason=f"the recorded verdict is {str(said)[:40]!r}, which is none")


@dataclass(frozen=True)
class Recorded:
    """A pair by its name, the text of its side a, and the verdicts with a and with b shown first."""

    name: str
    a: str
    first: Verdict
    other: Verdict


def _said(record: Recorded | None, pair: Pair) -> Verdict:
    if record is None:
        return Verdict(None, reason="no verdict was recorded for this pair")
    return record.first if pair.a.text.strip() == record.a.strip() else record.other.turned()


def _name(prompt: Any, a: str, b: str) -> str:
    return key_of(show_text(prompt).strip(), *sorted((a.strip(), b.strip())))


def _picked(row: Mapping[str, Any], path: str) -> Any:
    """The column `path`, or what the dotted path leads to."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def _read(path: str) -> List[dict[str, Any]]:
    try:
        raw = gzip.decompress(Path(path).read_bytes()) if path.endswith(".gz") else Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
        rows = (
            json.loads(text)
            if text.lstrip()[:1] == "["
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (OSError, ValueError) as error:
        raise DataError(f"the recorded verdicts cannot be read: {error}", where=path) from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError("the recorded verdicts must be objects", where=path)
    return list(rows)
