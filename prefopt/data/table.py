"""Rollouts as a parquet file that any tool reads. Knows columns; not where rollouts come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow
from pyarrow.parquet import ParquetWriter

SCHEMA: Final = pyarrow.schema(
    {
        "step": pyarrow.int64(),
        "row": pyarrow.int64(),
        "prompt": pyarrow.string(),
        "completion": pyarrow.string(),
        "role": pyarrow.string(),
        "source": pyarrow.string(),
        "score": pyarrow.float64(),
        "finished": pyarrow.bool_(),
        "ids": pyarrow.list_(pyarrow.int64()),
        "logps": pyarrow.list_(pyarrow.float64()),
        "used": pyarrow.bool_(),
        "reason": pyarrow.string(),
    }
)


def write_rollouts(path: Path, steps: Iterable[Iterable[Mapping[str, Any]]]) -> None:
    """Writes the completions of each step, one row for each, step by step; the file appears when it is whole."""
    partial = path.with_name(f".{path.name}.tmp")
    with ParquetWriter(partial, SCHEMA) as writer:
        for rows in steps:
            writer.write_table(pyarrow.Table.from_pylist(list(rows), SCHEMA))
    partial.replace(path)
