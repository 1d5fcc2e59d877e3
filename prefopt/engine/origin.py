"""What a result depends on beside its configuration, and whether it is still the same when a run is resumed."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefopt.config import RunConfig
from prefopt.engine.folder import digest
from prefopt.errors import DataError, Problem, redact
from prefopt.plugins import Plugins


def describe(config: RunConfig, plugins: Plugins) -> dict[str, Any]:
    """What a result depends on beside its configuration: versions of code, hashes of data."""
    owner = plugins.registry.owner(type(config.algorithm))
    named = {"name": config.algorithm.name, "distribution": owner.distribution, "version": owner.version}
    return {"algorithm": named, **surroundings(config.data.source.files)}


def surroundings(files: Iterable[str]) -> dict[str, Any]:
    """Versions of code, and hashes of files."""
    packages = ("prefopt", "torch", "transformers", "tokenizers", "accelerate", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "data": {name: digest(Path(name)) for name in files},
    }


def compare(before: Mapping[str, Any], now: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """What a run began with, and what it finds when it is resumed. Raises `DataError` for data that changed; code that
    changed is worth a warning."""
    old, new = before.get("data", {}), redact(now["data"])
    fix = "Put back the file the run began with, or begin another run."
    changed = [Problem("the file changed since the run began", name, fix) for name in new if new[name] != old.get(name)]
    if changed:
        raise DataError(*changed)
    versions = [(name, before.get("versions", {}).get(name), number) for name, number in now["versions"].items()]
    if "algorithm" in now:
        owner = now["algorithm"]
        versions.append((owner["distribution"], before.get("algorithm", {}).get("version"), owner["version"]))
    for name, then, number in versions:
        if then != number:
            warn(f"the run began with {name} {then} and goes on with {number}: its numbers may differ")
