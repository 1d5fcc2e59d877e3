"""Reads files of records by index, keeping the place of each. Knows nothing about what the records mean.

No file is held as a list of rows. JSONL and CSV are indexed by byte offset and parsed on access; a gzipped file is
unpacked once into an unnamed temporary file. Parquet is unpacked once into a temporary Arrow file, which is mapped. A
JSON file is held as its text and parsed item by item. Hub data sets are mapped by `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import tempfile
import weakref
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

from prefopt.errors import DataError, Problem

MAX_PROBLEMS = 50
BOM: Final = b"\xef\xbb\xbf"
Fields = dict[str, Any]


class BadRow(DataError):
    """One row that cannot be used. `sort` is the class of problems it is counted under."""

    def __init__(self, sort: str, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.sort = sort

    def at(self, where: str) -> BadRow:
        """The same, found at `where`."""
        problem = self.problems[0]
        return BadRow(self.sort, problem.what, f"{where}, {problem.where}" if problem.where else where, problem.fix)


class Cell(str):
    """Text of a CSV file, where numbers and truth values are text too."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stood (`file:line`, or the row's number from 0)."""

    where: str
    data: Fields


class Records(ABC):
    """Records by index."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """The place of a record."""

    @abstractmethod
    def fields(self, index: int) -> Fields:
        """The fields of a record. Raises `BadRow`, without a place, when they cannot be read."""

    def __getitem__(self, index: int) -> Record:
        where = self.where(index)
        try:
            return Record(where, self.fields(index))
        except BadRow as error:
            raise error.at(where) from None


class Part(Records):
    """The records of others from `start` up to `stop`. Raises `DataError` when there are none."""

    def __init__(self, whole: Records, start: int, stop: int | None) -> None:
        self.name, self.whole = whole.name, whole
        self.range = range(*slice(start, stop).indices(len(whole)))
        if not self.range:
            raise DataError(f"there are {len(whole)} rows, and none from {start} on", where=whole.name)

    def __len__(self) -> int:
        return len(self.range)

    def where(self, index: int) -> str:
        return self.whole.where(self.range[index])

    def fields(self, index: int) -> Fields:
        return self.whole.fields(self.range[index])


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow("field twice", f"field `{next(k for k in keys if keys.count(k) > 1)}` is written twice")
    return data


DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique)


def shortened(problems: list[Problem]) -> list[Problem]:
    """At most 50 problems, and a line that counts the rest."""
    rest = len(problems) - MAX_PROBLEMS
    return problems if rest <= 0 else [*problems[:MAX_PROBLEMS], Problem(f"and {rest:,} more problems")]


# --- files cut into pieces: JSONL and CSV -----------------------------------------------------------------------------

Cut = Iterable[tuple[int, int, int]]
"""(line number, first byte, number of bytes) of each record."""


class Pieces(Records):
    """A file whose records are read by byte offset and decoded one by one."""

    def __init__(self, path: Path, file: BinaryIO, cuts: Cut, decode: Callable[[bytes], Fields]) -> None:
        self.name, self.file, self.decode = str(path), file, decode
        weakref.finalize(self, file.close)
        self.lines, self.starts, self.sizes = array("q"), array("q"), array("q")
        for line, start, size in cuts:
            self.lines.append(line)
            self.starts.append(start)
            self.sizes.append(size)

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        return f"{self.name}:{self.lines[index]}"

    def fields(self, index: int) -> Fields:
        return self.decode(os.pread(self.file.fileno(), self.sizes[index], self.starts[index]))


def read_jsonl(path: Path, limit: int | None = None) -> Records:
    """One JSON object on each line; blank lines are passed over. `limit` reads the first lines only."""
    file = _opened(path, limit)
    return _filled(Pieces(path, file, _lines(file, limit), _object))


def _opened(path: Path, limit: int | None = None) -> BinaryIO:
    """The file, unpacked into a temporary one when it is gzipped: its first `limit` lines, or all."""
    try:
        if path.suffix != ".gz":
            return path.open("rb")
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the records
        with gzip.open(path) as packed:
            unpacked.writelines(islice(packed, limit))
        unpacked.seek(0)
        return unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the file: {getattr(error, 'strerror', None) or error}", where=str(path)) from None


def _filled(records: Records) -> Records:
    if not len(records):
        raise DataError("the file has no rows", where=records.name)
    return records


def _lines(file: BinaryIO, limit: int | None) -> Cut:
    start = 0
    for number, line in enumerate(islice(file, limit), 1):
        if not line.isspace():
            yield number, start, len(line)
        start += len(line)


def _object(line: bytes) -> Fields:
    """The object on a line of JSONL."""
    try:
        text = line.removeprefix(BOM).decode().strip()
        data, end = DECODER.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        listed = "The file may be a JSON list: use source json." if line.strip() == b"[" else ""
        raise BadRow("not JSON", f"not JSON: {error.msg} at column {error.colno}", fix=listed) from None
    except (RecursionError, ValueError) as error:
        raise _unreadable(error) from None
    return _named(data)


def _unreadable(error: Exception) -> BadRow:
    """JSON that Python's reader gives up on: nested too deeply, a number of thousands of digits."""
    return BadRow("not JSON", "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}")


def _named(data: Any) -> Fields:
    if not isinstance(data, dict):
        raise BadRow("not an object", f"a row is an object with named fields, not {type(data).__name__}")
    return data


def read_csv(path: Path, limit: int | None = None) -> Records:
    """A CSV file with a header; values are text, and may hold quoted commas and line ends."""
    file = _opened(path)
    cuts = _csv_cuts(path, file, limit)
    _, start, size = next(cuts, (0, 0, 0))
    header = _cells(os.pread(file.fileno(), size, start)) if size else []
    double = next((name for name in header if header.count(name) > 1), None)
    if double is not None:
        raise DataError(f"column `{double}` is named twice", where=f"{path}:1")
    return _filled(Pieces(path, file, cuts, lambda line: _cell_fields(line, header)))


def _csv_cuts(path: Path, file: BinaryIO, limit: int | None) -> Iterator[tuple[int, int, int]]:
    """The header, then the records. A record may reach over several lines."""
    seen = {"bytes": 0, "lines": 0}

    def fed() -> Iterator[str]:
        for line in file:
            seen["bytes"] += len(line)
            seen["lines"] += 1
            yield line.decode("utf-8", "surrogateescape")

    reader, start, first = csv.reader(fed(), strict=True), 0, 1
    try:
        for cells in islice(reader, None if limit is None else limit + 1):
            if cells:
                yield first, start, seen["bytes"] - start
            start, first = seen["bytes"], seen["lines"] + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}, in the row that starts here", where=f"{path}:{first}") from None


def _cells(line: bytes) -> list[str]:
    text = line.removeprefix(BOM).decode("utf-8", "surrogateescape")
    return next(csv.reader(io.StringIO(text, newline=""), strict=True), [])


def _cell_fields(line: bytes, header: Sequence[str]) -> Fields:
    cells = _cells(line)
    if len(cells) != len(header):
        raise BadRow("not as wide as the header", f"has {len(cells)} cells, but the header has {len(header)}")
    return {name: Cell(cell) for name, cell in zip(header, cells, strict=True)}


# --- JSON -------------------------------------------------------------------------------------------------------------

LIST_KEYS: Final = ("data", "examples", "rows", "instances")
SPACE: Final = re.compile(r"[ \t\r\n]*")


class Items(Records):
    """A JSON list, held as text."""

    def __init__(self, path: Path, text: str, limit: int | None) -> None:
        self.name, self.text = str(path), text
        self.lines, self.starts = array("q"), array("q")
        line, last = 1, 0
        for start in islice(_items(path, text), limit):
            line, last = line + text.count("\n", last, start), start
            self.lines.append(line)
            self.starts.append(start)

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        return f"{self.name}:{self.lines[index]}"

    def fields(self, index: int) -> Fields:
        return _named(DECODER.raw_decode(self.text, self.starts[index])[0])


class Listed(Records):
    """Records held in memory: a few to look at, or the columns of a JSON object."""

    def __init__(self, name: str, size: int, at: Callable[[int], Any]) -> None:
        self.name, self.size, self.at = name, size, at

    def __len__(self) -> int:
        return self.size

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def fields(self, index: int) -> Fields:
        return _named(self.at(index))


def read_json(path: Path, limit: int | None = None) -> Records:
    """A list of objects; or an object that holds one as `data`, `examples`, `rows` or `instances`, or that holds
    columns of equal length."""
    try:
        with _opened(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start}", where=str(path)) from None
    if text.lstrip(" \t\r\n")[:1] == "[":
        return _filled(Items(path, text, limit))
    return _filled(_inside(path, _decoded(path, text, 0, whole=True)[0], limit))


def _decoded(path: Path, text: str, start: int, whole: bool = False) -> tuple[Any, int]:
    """The value at `start` and where it ends; a field written twice is left for the row to report."""
    try:
        return (json.loads(text), len(text)) if whole else json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        lines = "The file may be JSONL: use source jsonl." if error.msg == "Extra data" else ""
        what = f"not JSON: {error.msg} at column {error.colno}"
        raise DataError(what, where=f"{path}:{error.lineno}", fix=lines) from None
    except (RecursionError, ValueError) as error:
        raise DataError(*_unreadable(error).at(str(path)).problems) from None


def _items(path: Path, text: str) -> Iterator[int]:
    """Where each item of a JSON list starts."""
    place = _skip(text, _skip(text, 0) + 1)
    while text[place : place + 1] != "]":
        yield place
        place = _skip(text, _decoded(path, text, place)[1])
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            line = text.count("\n", 0, place) + 1
            raise DataError("not JSON: expected `,` or `]` after an item", where=f"{path}:{line}")


def _skip(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return found.end() if found else place


def _inside(path: Path, data: Any, limit: int | None) -> Records:
    """The rows inside a JSON object."""
    lists = {k: v for k, v in data.items() if isinstance(v, list)} if isinstance(data, dict) else {}
    named = [key for key in LIST_KEYS if key in lists]
    if len(named) == 1:
        rows = lists[named[0]][:limit]
        return Listed(f"{path}, `{named[0]}`", len(rows), rows.__getitem__)
    sizes = {len(v) for v in lists.values()}
    if lists and len(lists) == len(data) and len(sizes) == 1:
        size = min(sizes.pop(), limit if limit is not None else 1 << 62)
        return Listed(str(path), size, lambda i: {name: column[i] for name, column in lists.items()})
    raise DataError(
        "the file is neither a list of rows, nor an object with one, nor columns of equal length",
        where=str(path),
        fix=f"Write a list of objects, or put it under one of {', '.join(LIST_KEYS)}.",
    )


# --- Parquet and hub data sets ----------------------------------------------------------------------------------------


def _present(fields: Mapping[str, Any]) -> Fields:
    """Arrow gives every row every column: a null means that the row does not have it."""
    return {key: value for key, value in fields.items() if value is not None}


class Mapped(Records):
    """An Arrow table in a temporary file, mapped into memory."""

    def __init__(self, path: Path, file: Any) -> None:
        import pyarrow as pa

        self.name, self.folder = str(path), tempfile.TemporaryDirectory()
        unpacked = f"{self.folder.name}/rows.arrow"
        with pa.OSFile(unpacked, "wb") as sink, pa.ipc.new_file(sink, file.schema_arrow) as writer:
            for batch in file.iter_batches():
                writer.write_batch(batch)
        self.table = pa.ipc.open_file(pa.memory_map(unpacked)).read_all()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def fields(self, index: int) -> Fields:
        return _present(self.table.slice(index, 1).to_pylist()[0])


def read_parquet(path: Path, limit: int | None = None) -> Records:
    """A Parquet file; a null counts as an absent field."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if limit is None:
            return _filled(Mapped(path, file))
        first = next(iter(file.iter_batches(batch_size=limit)), None)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read the file: {_first_line(error)}", where=str(path)) from None
    rows = [] if first is None else first.to_pylist()
    return _filled(Listed(str(path), len(rows), lambda i: _present(rows[i])))


def read_hub(path: str, subset: str | None, split: str, revision: str | None) -> Records:
    """A data set of the hub, a folder that `datasets` saved, or a folder of files it can read."""
    import datasets

    folder = Path(path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(path, subset, split=split, revision=revision)
    except Exception as error:  # whatever that library and its network raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        fix = "Name a data set, a split and a subset that exist; offline, a folder that `save_to_disk` wrote."
        raise DataError(f"cannot load the data set: {reason}", where=f"{path}, split {split}", fix=fix) from None
    return _filled(Listed(f"{path}, split {split}", len(found), lambda i: _present(found[i])))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
