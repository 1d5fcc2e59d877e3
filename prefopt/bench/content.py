"""What a result depends on beside its configuration: code, versions, data files and models, known by their content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefopt.components import Component
from prefopt.config.load import named_files, parts_of
from prefopt.data.render import find_model
from prefopt.engine.folder import digest
from prefopt.errors import PrefoptError
from prefopt.preflight import WORLD

Find = Callable[[str, str], type[Component]]

LIBRARIES = ("prefopt", "torch", "transformers", "tokenizers", "numpy")
SOURCES = (".py", ".cpp")
"""The ends of names of files that are code."""
MODEL_FILES = frozenset({".json", ".safetensors", ".model", ".txt", ".jinja", ".py"})
"""Suffixes of what is read from a model folder."""


def plain(config: BaseModel) -> dict[str, Any]:
    """A configuration as plain data with every default written out; it loads again to the same run. It holds secrets as
    they are: for people, pass it through `prefopt.errors.redact`."""
    data: dict[str, Any] = json.loads(json.dumps(config.model_dump(mode="json")))
    return data


def key_of(facts: Any) -> str:
    """The address of plain data."""
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def dependencies(config: Any, find: Find) -> dict[str, Any]:
    """Everything outside a configuration, or several, that its result depends on: the code of prefopt and of the
    packages of its components, versions of libraries, its data files, and the local models it names."""
    parts = list(parts_of(config))
    components = [part for part in parts if isinstance(part, Component)]
    texts = sorted({part for part in parts if isinstance(part, str)})
    classes = [*map(type, components), *_worlds(texts, find)]
    packages = sorted({"prefopt", *(cls.__module__.partition(".")[0] for cls in classes)})
    files = named_files(config)
    models = {text: folder for text in texts if (folder := _model_folder(text)) is not None}
    return {
        "code": {name: fingerprint(name) for name in packages},
        "versions": dict(_versions()),
        "files": {name: _file(Path(name).expanduser()) for name in files},
        "models": {text: {path.name: _file(path) for path in _model_files(folder)} for text, folder in models.items()},
    }


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in LIBRARIES)


def _worlds(texts: list[str], find: Find) -> Iterator[type[Component]]:
    for text in texts:
        if text.startswith(WORLD):
            with suppress(PrefoptError):  # an unknown world is reported when the run is checked
                yield find("world", text.removeprefix(WORLD))


def _model_folder(text: str) -> Path | None:
    try:
        return find_model(text)
    except (OSError, ValueError, RuntimeError):
        return None  # no path at all: too long, a null byte, an unknown home


def _model_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES and not path.name.startswith("."))


def _file(path: Path) -> str | None:
    """sha256 of a file, read again only when its size or time has changed; None when it is not there."""
    if not path.is_file():
        return None
    facts = path.stat()
    return _digest(path, facts.st_size, facts.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    return digest(path)


@cache
def fingerprint(package: str) -> str:
    """A hash of every source file of a package."""
    module = import_module(package)
    roots = [Path(folder) for folder in getattr(module, "__path__", ())]
    files = [(root, file) for root in roots for file in sorted(root.rglob("*")) if file.suffix in SOURCES]
    if not roots and module.__file__:
        files = [(Path(module.__file__).parent, Path(module.__file__))]
    total = sha256()
    for root, file in files:
        total.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()
