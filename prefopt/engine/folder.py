"""The folder of a run: who may write to it, and what it says about itself. Private to its owner, locked while in
use."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError, ResourceError, redact


class RunFolder:
    """Paths inside a run folder, and its status file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.base = path / "base"
        self.kept = path / "kept"
        self.journal = path / "journal"
        self.config = path / "config.yaml"
        self.info = path / "run.json"
        self.result = path / "result.json"
        self.before_run = {".lock", "timings.jsonl"}
        """What a run that ended before `run.json` was written leaves behind."""

    @property
    def finished(self) -> bool:
        return self.result.exists()

    def create(self) -> None:
        """Makes the folder, readable by its owner alone. Raises `ConfigError` when a run, or anything else,
        is in it already."""
        if self.finished:
            raise ConfigError(
                f"`{self.path}` holds a finished run",
                where="run.dir",
                fix="Choose another run.dir, or delete the folder.",
            )
        if self.info.exists():
            fix = f"`prefopt resume {self.path}` continues it; or choose another run.dir."
            raise ConfigError(f"`{self.path}` holds an unfinished run", where="run.dir", fix=fix)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            other = sorted(path.name for path in self.path.iterdir() if path.name not in self.before_run)
            if other:
                what = f"`{self.path}` is not empty, and no run: it holds {', '.join(other[:3])}"
                raise ConfigError(what, where="run.dir", fix="Choose a new folder: it becomes private to you.")
            self.path.chmod(0o700)
        except OSError as error:
            raise ResourceError(f"the run folder cannot be made: {error.strerror}", where=str(self.path)) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder. Raises `ResourceError` when another process does."""
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            yield
        except BlockingIOError:
            holder = os.read(handle, 20).decode() or "another process"
            raise ResourceError(f"the run folder is in use by process {holder}", where=str(self.path)) from None
        finally:
            os.close(handle)

    def write(self, path: Path, data: Mapping[str, Any]) -> None:
        """A JSON file, without secrets, replaced in one go."""
        write_text(path, json.dumps(redact(dict(data)), indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one go: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def digest(path: Path) -> str:
    """sha256 of a file."""
    total = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
