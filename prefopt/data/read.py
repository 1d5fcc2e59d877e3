"""Reads files of records, keeping the line number of each. Knows nothing about what the records mean."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from prefopt.errors import DataError, Problem

MAX_PROBLEMS = 50


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stood (`file:line`)."""

    where: str
    data: dict[str, Any]


def read_jsonl(path: Path, limit: int | None = None) -> list[Record]:
    """The records of a JSONL file, plain or gzipped. Raises `DataError` with every bad line (the first 50)."""
    records: list[Record] = []
    problems: list[Problem] = []
    for number, line in islice(enumerate(_lines(path), 1), limit):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            records.append(Record(where, _record(line)))
        except ValueError as error:
            problems.append(Problem(str(error), where))
    if problems:
        raise DataError(*shortened(problems))
    if not records:
        raise DataError("the file has no rows", where=str(path))
    return records


def shortened(problems: list[Problem]) -> list[Problem]:
    """At most 50 problems, and a line that counts the rest."""
    rest = len(problems) - MAX_PROBLEMS
    return problems if rest <= 0 else [*problems[:MAX_PROBLEMS], Problem(f"and {rest:,} more problems")]


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the file: {getattr(error, 'strerror', None) or error}", where=str(path)) from None


def _record(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line.decode("utf-8-sig").rstrip(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(data, dict):
        raise ValueError(f"a row is an object with named fields, not {type(data).__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"field `{next(k for k in keys if keys.count(k) > 1)}` is written twice")
    return data
