"""Rows of a file or a data set by index: each record is read, its columns renamed, and parsed when it is asked for.

The format is decided once, from the first records, and said in words; a record that does not fit it is a `BadRow`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, TypeAlias, overload

from prefopt.data.fields import BadField, shown
from prefopt.data.formats import BY_NAME, KNOWN, Format, described, recognised
from prefopt.data.read import BadRow, Cell, Fields, Records
from prefopt.errors import DataError, did_you_mean
from prefopt.rows import Comparison, Demonstration, Judgement, Ranking, Row, Text, show_text

PEEK: Final = 200
Value: TypeAlias = str | int | float | bool
Columns: TypeAlias = Mapping[str, str | tuple[str, ...]]
Labels: TypeAlias = Mapping[str, Value | tuple[Value, ...]]
MARKED: Final = ("label", "kto_tag", "raters")
TRUTHS: Final[Mapping[str, bool | str]] = {"desirable": True, "undesirable": False, "a": "a", "b": "b", "tie": "tie"}
LISTS: Final = frozenset({"raters", "completions", "scores", "ranks", "votes"})
TURNS: Final = re.compile(r"\n\n(?:Human|Assistant):")
HINT: Final = "Say which columns are which with data.columns, such as {prompt: question, completion: answer}."


@dataclass(frozen=True)
class Names:
    """How a file's columns are called. `columns` maps our field to theirs, a dotted path, or several, which are joined;
    `labels` maps our label to the values that stand for it."""

    columns: Columns
    labels: Labels

    def apply(self, data: Fields) -> Fields:
        """The record under our names. Columns not named keep theirs."""
        if not self.columns and not self.labels:
            return data
        rest = {k: v for k, v in data.items() if k not in self._used}
        named = {**rest, **{ours: self._column(data, ours, theirs) for ours, theirs in self.columns.items()}}
        if self.labels:
            named |= {name: self._marked(named[name], name) for name in MARKED if name in named}
        return named

    @cached_property
    def _used(self) -> frozenset[str]:
        return frozenset(name for theirs in self.columns.values() for name in _several(theirs))

    def _column(self, data: Fields, ours: str, theirs: str | tuple[str, ...]) -> Any:
        if isinstance(theirs, str):
            return _picked(data, theirs)
        parts = [_picked(data, name) for name in theirs]
        if ours in LISTS:
            return parts
        wrong = next((name for name, part in zip(theirs, parts, strict=True) if not isinstance(part, str)), None)
        if wrong is not None:
            raise BadField("not text", wrong, "must be text, to be joined with other columns")
        return "\n".join(part for part in parts if part)

    def _marked(self, value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [self._mark(v, name) for v in value]
        return self._mark(value, name)

    def _mark(self, value: Any, name: str) -> Any:
        for ours, theirs in self.labels.items():
            if any(_same(value, v) for v in _several(theirs)):
                return TRUTHS[ours]
        raise BadField("label", name, f"is {shown(value)}, which data.labels does not name")


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _same(value: Any, wanted: Value) -> bool:
    """Equality that tells 1 from true; in a CSV file everything is text."""
    return str(value) == str(wanted) if isinstance(value, Cell) else type(value) is type(wanted) and value == wanted


def _picked(data: Fields, path: str) -> Any:
    """The column `path`; where there is none, what the dotted path leads to."""
    if path in data:
        return data[path]
    value: Any = data
    for key in path.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise BadField(
                "wrong fields", path, f"is missing; the record has {described(data)}", did_you_mean(path, data)
            )
    return value


class Rows(List[Row]):
    """Rows by index. Asking for a bad one raises `BadRow` with its place."""

    def __init__(self, records: Records, form: Format | None, names: Names) -> None:
        self.records, self.names = records, names
        self.form = self._first(lambda i: recognised(names.apply(records[i].data))) if form is None else form
        if self.form is None:
            raise self._unrecognised()
        example = self._first(self._parsed)
        self.example = example
        self.conversational = None if example is None else not isinstance(example.prompt, str)

    def _first(self, get: Callable[[int], Any]) -> Any:
        """The first result among the first records; those that cannot be read are reported in their turn."""
        for i in range(min(len(self.records), PEEK)):
            try:
                found = get(i)
            except BadRow:
                continue
            if found is not None:
                return found
        return None

    def _unrecognised(self) -> DataError:
        record = self._first(lambda i: self.records[i])
        if record is None:
            problems = [e.problems[0] for e in self._failures(min(len(self), 50))]
            return DataError(*problems)
        try:
            data = self.names.apply(record.data)
        except BadRow as error:
            return DataError(*error.at(record.where).problems)
        what = f"no format fits a record with {described(data)}"
        return DataError(what, where=record.where, fix=f"{HINT}\n    {KNOWN}")

    def _failures(self, size: int) -> Iterator[BadRow]:
        for i in range(size):
            try:
                self.records[i]
            except BadRow as error:
                yield error

    def __len__(self) -> int:
        return len(self.records)

    def where(self, index: int) -> str:
        """The place of a row."""
        return self.records.where(index)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> List[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | List[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return replace(self.read(index % len(self)), index=index % len(self))

    def read(self, index: int) -> Row:
        """A row that does not know its index: what looking at every row needs. Raises `BadRow` with its place."""
        try:
            row = self._parsed(index)
            if isinstance(row.prompt, str) == self.conversational:
                others = "conversations" if self.conversational else "plain text"
                raise BadRow("mixed", f"is unlike the first rows, which are {others}")
        except BadRow as error:
            raise error.at(self.where(index)) from None
        return row

    def _parsed(self, index: int) -> Row:
        data = self.names.apply(self.records.fields(index))
        if not self.form.needs <= data.keys():
            raise BadRow("wrong fields", f"{described(data)}, unlike the first row, which is {self.form.name}")
        return self.form.parse(data)

    def __str__(self) -> str:
        """The verdict: what the rows were taken for."""
        shape = {True: "conversations", False: "plain text", None: "nothing readable"}[self.conversational]
        prompt = ", implicit prompt" if self.form.implicit else ""
        verdict = f"{self.form.name}, {shape}{prompt}: {self.form.kind.kind} rows"
        if self.form.implicit and self.example is not None:
            verdict += f"; the first prompt ends {show_text(self.example.prompt)[-60:]!r}"
        return verdict


def rows_of(records: Records, form: str = "auto", columns: Columns | None = None, labels: Labels | None = None) -> Rows:
    """The rows of some records. Raises `DataError` when no format fits the first of them."""
    return Rows(records, None if form == "auto" else BY_NAME[form], Names(columns or {}, labels or {}))


def verdict(rows: List[Row]) -> str:
    """What rows are, in words; of a source that makes rows itself, only their kind."""
    whole = getattr(rows, "rows", rows)  # of which some are left out
    if isinstance(whole, Rows):
        return f"{whole}, {len(rows):,} of {len(whole):,} usable" if whole is not rows else str(whole)
    return f"{rows[0].kind if len(rows) else 'no'} rows"


def remarks(row: Row) -> Iterator[str]:
    """What is odd about a row and yet no error: it is counted."""
    texts = _replies(row)
    if not all(texts) or any(map(str.isspace, texts)):
        yield "empty completions"
    if TURNS.search("\0".join(texts)):
        yield "completions with further turns"
    if _blank(row.prompt):
        yield "empty prompts"
    if isinstance(row, Comparison) and row.preference == 0.5:
        yield "ties"


def _replies(row: Row) -> tuple[str, ...]:
    if isinstance(row, Comparison):
        return row.chosen.text, row.rejected.text
    if isinstance(row, Ranking):
        return tuple(reply.text for reply in row.completions)
    return (row.completion.text,) if isinstance(row, Demonstration | Judgement) else ()


def _blank(prompt: Text) -> bool:
    text = prompt if isinstance(prompt, str) else prompt[-1].content
    return not text or text.isspace()
