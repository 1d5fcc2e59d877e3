"""Values kept on disk under the hash of what they depend on. Knows keys and numbers; no model, no sequence.

One SQLite file holds `key -> float32 bytes`; a write is there as a whole or not at all, so a killed run loses nothing
it kept and leaves nothing broken.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prefopt.errors import ResourceError

ASKED_AT_ONCE = 500


class Store:
    """Vectors of float32 by key. Raises `ResourceError` when its file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as db:
                db.execute("create table if not exists kept (key blob primary key, value blob not null) without rowid")
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(f"cannot keep values in the file: {error}", where=str(path)) from None

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """The vectors of those keys that are kept."""
        found: dict[bytes, Tensor] = {}
        with closing(self._open()) as db:
            for first in range(0, len(keys), ASKED_AT_ONCE):
                some = keys[first : first + ASKED_AT_ONCE]
                query = f"select key, value from kept where key in ({','.join('?' * len(some))})"
                for key, value in db.execute(query, some):
                    found[key] = torch.from_numpy(np.frombuffer(value, dtype="<f4").copy())
        return found

    def put(self, values: Mapping[bytes, Tensor]) -> None:
        """Keeps the vectors; a key that is there already stays as it is."""
        rows: Iterable[tuple[bytes, bytes]] = ((key, x.numpy().astype("<f4").tobytes()) for key, x in values.items())
        with closing(self._open()) as db, db:
            db.executemany("insert or ignore into kept values (?, ?)", rows)
