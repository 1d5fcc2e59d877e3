"""The core's own data sources."""

from __future__ import annotations

from collections.abc import Sequence as List
from pathlib import Path

from prefopt.api import DataSource, Row, Services, UserPath
from prefopt.data.formats import to_rows
from prefopt.data.read import read_jsonl

PEEK = 200


class Jsonl(DataSource):
    """One JSON object on each line, plain or gzipped; the kind of row follows from its fields."""

    name = "jsonl"

    path: UserPath
    """The file, ending in `.jsonl` or `.jsonl.gz`."""

    def open(self, services: Services) -> List[Row]:
        return to_rows(read_jsonl(Path(self.path)))

    def peek(self, services: Services) -> List[Row]:
        return to_rows(read_jsonl(Path(self.path), limit=PEEK))

    @property
    def files(self) -> tuple[str, ...]:
        return (self.path,)
