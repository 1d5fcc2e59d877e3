"""Replies of judges, kept for good. Knows keys and JSON; no judge, no network.

One SQLite file, to which lines are only added: the hash of the request, who answered, the version of the question's
words, the reply, and what it took. A reply is there as a whole or not at all.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prefopt.api import ResourceError

TABLE = (
    "create table if not exists replies (request text primary key, model text not null, words text not null, "
    "reply text not null, usage text not null) without rowid"
)


def request_hash(**parts: Any) -> str:
    """The name of a request, by its content."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return blake2b(text.encode(), digest_size=32).hexdigest()


class Replies:
    """What judges said, by request. Without a file nothing is kept. Raises `ResourceError` when the file cannot be
    used."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as db, db:
                db.execute(TABLE)
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(f"replies of judges cannot be kept in the file: {error}", where=str(path)) from None

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(str(self.path), timeout=60)

    def get(self, request: str) -> tuple[Any, dict[str, float]] | None:
        """The reply to a request, and what it took; None when nobody has answered it."""
        if self.path is None:
            return None
        with closing(self._open()) as db:
            row = db.execute("select reply, usage from replies where request = ?", (request,)).fetchone()
        return None if row is None else (json.loads(row[0]), json.loads(row[1]))

    def add(self, request: str, model: str, words: str, reply: Any, usage: Mapping[str, float]) -> None:
        """Keeps a reply; one that is there already stays as it is."""
        if self.path is None:
            return
        row = (request, model, words, json.dumps(reply), json.dumps(dict(usage)))
        with closing(self._open()) as db, db:
            db.execute("insert or ignore into replies values (?, ?, ?, ?, ?)", row)
