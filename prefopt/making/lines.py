"""Files of rows that grow while they are made: whole lines, and for each row who made it. What is there need not be
made again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prefopt.data.formats import FORMATS, PAIR_NUMBERS
from prefopt.errors import ConfigError
from prefopt.rows import Comparison, Completion, Demonstration, Judgement, Ranking, Rollout, Row, Text

MADE = {"drawn": (), "judged": ("principle",), "revised": ("draft", "trace")}
"""Columns that say how a row was made, and those that stand beside them."""
READ = frozenset({"ranks", "scores", "raters", *PAIR_NUMBERS}).union(*(f.needs for f in FORMATS))
"""Columns that belong to the replies of a row."""


class RowsFile:
    """Rows, one on each line; `field` of each holds its key and who made it. Raises `ConfigError` when the file holds
    rows that were made otherwise."""

    def __init__(self, path: Path, field: str, by: Mapping[str, Any]) -> None:
        self.path, self.field = path, field
        self.by = blake2b(json.dumps(by, sort_keys=True).encode(), digest_size=8).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        made = [record[field] for record in self.records()]
        if any(one["by"] != self.by for one in made):
            fix = "Choose another `out`: labels of two judges in one file could not be told apart."
            raise ConfigError(
                "the labels there are by another judge, or were asked for otherwise", where=str(path), fix=fix
            )
        self.keys = {str(one["key"]) for one in made}

    def append(self, made: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Adds rows, each with its key, and waits until they are on the disk."""
        append(self.path, [self._signed(key, record) for key, record in made])

    def records(self) -> list[dict[str, Any]]:
        """All rows there are."""
        return [json.loads(line) for line in whole_lines(self.path)]

    def _signed(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        self.keys.add(key)
        return {**record, self.field: {**record.get(self.field, {}), "key": key, "by": self.by}}


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines to a file, and waits until they are on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """The lines of a file; what was cut short behind the last of them is removed."""
    if not path.exists():
        return []
    found = path.read_bytes()
    whole = found[: found.rfind(b"\n") + 1]
    if len(whole) < len(found):
        os.truncate(path, len(whole))
    return [line for line in whole.decode("utf-8").split("\n") if line]


def key_of(row: Row) -> str:
    """What tells a row from the others of its source: its place, prompt and replies."""
    named = json.dumps([row.index, repr(row.prompt), *(reply.text for reply in replies_of(row))])
    return blake2b(named.encode(), digest_size=16).hexdigest()


def replies_of(row: Row) -> tuple[Completion, ...]:
    """The replies that a row holds."""
    if isinstance(row, Demonstration | Judgement):
        return (row.completion,)
    if isinstance(row, Comparison):
        return (row.chosen, row.rejected)
    return row.completions if isinstance(row, Ranking | Rollout) else ()


def several(rows: Iterable[Row]) -> bool:
    """Whether any row has more than two replies: all rows of a file are then written as rankings."""
    return any(len(replies_of(row)) > 2 for row in rows)


def carried(row: Row) -> dict[str, Any]:
    """What a made row has of the row it was made from: prompt, weight and columns, without those that said how that one
    was made, or by which a reader would take this one for another format."""
    made = {name for by, beside in MADE.items() if by in row.extra for name in (by, *beside)}
    kept = {name: x for name, x in row.extra.items() if name not in made | READ}
    weight = {} if row.weight == 1 else {"weight": row.weight}
    return {**kept, **weight, "prompt": plain(row.prompt)}


def plain(prompt: Text) -> Any:
    """A prompt as JSON."""
    return prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]
