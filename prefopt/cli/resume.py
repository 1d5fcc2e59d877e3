"""Reads a run folder back, so that its run goes on as it began. Knows nothing about checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefopt.config import Document, RunConfig, allowed_in, read_document, redacted_keys, run_from
from prefopt.config.stages import TRAIN, kind_of
from prefopt.config.yaml import Keys, apply_overrides
from prefopt.errors import ConfigError, Problem
from prefopt.plugins import Plugins, load
from prefopt.preflight import check

ANY_DIR = "run"


def read_back(folder: Path, overrides: Sequence[str]) -> tuple[RunConfig, Plugins, Document]:
    """The run in a folder, checked, the plugins it may use, and the document it was read from.

    `overrides` give back what was left out as secret. Raises `ConfigError` for a folder without a run that can go on.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        fix = "Name a `run.dir` in which `prefopt train` has begun a run."
        raise ConfigError("not a run folder: it has no config.yaml", where=str(folder), fix=fix)
    if (folder / "result.json").exists():
        raise ConfigError("the run is finished", where=str(folder))
    document = read_document(path)
    if kind_of(document) != TRAIN:
        fix = "`prefopt train` with the file of its stages goes on with it."
        raise ConfigError("rows are made here, and no model is trained", where=str(folder), fix=fix)
    document.put(("run", "dir"), Document(ANY_DIR))  # the folder may have moved: it is where it was found
    document = _completed(document, folder, overrides)
    plugins = load(allowed_in(document))
    config = run_from(document, plugins.find)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})
    check(config, plugins.registry, where=document.where)
    return config, plugins, document


def _completed(document: Document, folder: Path, overrides: Sequence[str]) -> Document:
    """The document with overrides for exactly those values that were not written out."""
    lost = {_dotted(keys): keys for keys in redacted_keys(document.data)}
    given = [text.partition("=")[0] for text in overrides]
    other = [name for name in given if name not in lost]
    if other:
        fix = "Begin another run with `prefopt train`."
        raise ConfigError(f"`{other[0]}` cannot change while a run is resumed", where="command line", fix=fix)
    problems = [_lost(name, document.where(keys), folder) for name, keys in lost.items() if name not in given]
    if problems:
        raise ConfigError(*problems)
    return apply_overrides(document, overrides)


def _lost(name: str, where: str, folder: Path) -> Problem:
    what = f"`{name}` holds a secret, which is not written to a run folder"
    return Problem(what, where, f"Give it again: prefopt resume {folder} {name}=VALUE")


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
