"""The core's own data sources: files and hub data sets. What a record means is found in `prefopt.data.formats`."""

from __future__ import annotations

from collections.abc import Sequence as List
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from prefopt.api import DataSource, Row, Services, UserPath
from prefopt.data.formats import BY_NAME
from prefopt.data.read import Part, Records, read_csv, read_hub, read_json, read_jsonl, read_parquet
from prefopt.data.source import PEEK, Labels, Value, rows_of
from prefopt.errors import did_you_mean

Label = Literal["a", "b", "tie", "desirable", "undesirable"]


T = TypeVar("T")


def _frozen(value: T | list[T]) -> T | tuple[T, ...]:
    return tuple(value) if isinstance(value, list) else value


class Tabular(DataSource):
    """Records whose kind of row follows from their fields."""

    format: str = "auto"
    """Name of the format, or `auto` to recognise it by the fields."""
    columns: dict[str, str | list[str]] = Field({})
    """What the file calls our fields: a column, a dotted path into it, or several to be joined."""
    labels: dict[Label, Value | list[Value]] = Field({})
    """Which values of a label column stand for `a`, `b`, `tie`, `desirable` or `undesirable`."""
    start: NonNegativeInt = 0
    """The first record to read, counted from 0."""
    stop: PositiveInt | None = None
    """The record to stop before. Default: none."""

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "auto" and value not in BY_NAME:
            raise ValueError(f"no format is called `{value}`. {did_you_mean(value, [*BY_NAME, 'auto'])}")
        return value

    def records(self, limit: int | None = None) -> Records:
        """The records, or the first of them."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _has_room(self) -> Tabular:
        if self.stop is not None and self.stop <= self.start:
            raise ValueError("`stop` must be greater than `start`")
        return self

    def _rows(self, records: Records) -> List[Row]:
        if self.start or self.stop is not None:
            records = Part(records, self.start, self.stop)
        columns = {ours: _frozen(theirs) for ours, theirs in self.columns.items()}
        labels: Labels = {ours: _frozen(theirs) for ours, theirs in self.labels.items()}
        return rows_of(records, self.format, columns, labels)

    def rows(self) -> List[Row]:
        """All rows by index, read when they are asked for; asking for a bad one raises."""
        return self._rows(self.records())

    def open(self, services: Services) -> List[Row]:
        return self.rows()

    def peek(self, services: Services) -> List[Row]:
        return self._rows(self.records(self.start + PEEK))


class File(Tabular):
    """A local file."""

    path: UserPath
    """The file."""

    @property
    def _path(self) -> Path:
        return Path(self.path)

    @property
    def files(self) -> tuple[str, ...]:
        return (self.path,)


class Jsonl(File):
    """One JSON object on each line, plain or gzipped; the kind of row follows from its fields."""

    name = "jsonl"

    def records(self, limit: int | None = None) -> Records:
        return read_jsonl(self._path, limit)


class Json(File):
    """A list of JSON objects, an object that holds one, or an object of columns; plain or gzipped."""

    name = "json"

    def records(self, limit: int | None = None) -> Records:
        return read_json(self._path, limit)


class Csv(File):
    """A CSV file with a header, plain or gzipped; say what its columns are with `columns`."""

    name = "csv"

    def records(self, limit: int | None = None) -> Records:
        return read_csv(self._path, limit)


class Parquet(File):
    """A Parquet file; a null counts as an absent field."""

    name = "parquet"

    def records(self, limit: int | None = None) -> Records:
        return read_parquet(self._path, limit)


class Hub(Tabular):
    """A data set of the hub, a folder that `datasets` saved, or a folder of files it can read."""

    name = "hub"

    path: UserPath
    """Its name on the hub, or the folder."""
    split: str = "train"
    """Which split."""
    subset: str | None = None
    """Which configuration of the data set, where it has several."""
    revision: str | None = None
    """Which version: a branch, a tag or a commit."""

    def records(self, limit: int | None = None) -> Records:
        return read_hub(self.path, self.subset, self.split, self.revision)


SOURCES: tuple[type[DataSource], ...] = (Jsonl, Json, Csv, Parquet, Hub)
BY_SUFFIX: dict[str, type[File]] = {".jsonl": Jsonl, ".ndjson": Jsonl, ".json": Json, ".csv": Csv, ".parquet": Parquet}
