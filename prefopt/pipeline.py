"""Runs the stages of a pipeline one after another. What is finished is kept; what was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from prefopt.config import Document, anchored, dump, named_files, read_document, resolved
from prefopt.config.models import RunConfig
from prefopt.config.stages import Config, Stage, stages_of
from prefopt.config.yaml import parse
from prefopt.engine.folder import digest
from prefopt.errors import ConfigError, redact
from prefopt.making.stage import WORKING, make
from prefopt.plugins import Plugins
from prefopt.preflight import check, promise
from prefopt.rows import Row
from prefopt.session import train

OTHERWISE: Final = "Choose another run.dir, or delete the folder of this stage and of those that build on it."


def checked(document: Document, plugins: Plugins, beside: Path | None = None) -> list[Stage]:
    """The stages, all of them checked before any is run."""
    stages = stages_of(document, plugins.find)
    promised: dict[str, type[Row] | None] = {}
    for stage in stages:
        check(stage.config, plugins.registry, promised, stage.document.where, beside)
        promised[stage.product] = promise(stage.config, promised)
        if _folder(stage).exists():
            _refuse_other(stage, _folder(stage))
    return stages


def run_stages(
    stages: list[Stage],
    plugins: Plugins,
    warn: Callable[[str], None] = print,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[str]:
    """Runs what is not finished; lines for each stage when it is. `say` hears how far the rows of one have come."""
    for stage in stages:
        folder = _folder(stage)
        if (folder / "result.json").exists():
            yield f"{stage.name}: finished before: {stage.product}"
            continue
        if isinstance(stage.config, RunConfig):
            result = train(stage.config, plugins, resume=(folder / "run.json").exists(), warn=warn)
            said = [f"{result.outcome}: {result.model}", *filter(None, [result.verdict])]
        else:
            said = make(stage.config, plugins, warn=warn, say=partial(_told, say, stage.name)).lines
        yield from (f"{stage.name}: {line}" for line in said)


def _told(say: Callable[[str], None], name: str, line: str) -> None:
    say(f"{name}: {line}")


def _folder(stage: Stage) -> Path:
    return Path(stage.config.run.dir)


def _refuse_other(stage: Stage, folder: Path) -> None:
    """A stage that was begun goes on as it was begun. Raises `ConfigError` when its configuration has changed."""
    kept = folder / "config.yaml"
    if kept.exists() and _telling(read_document(kept).data, stage.config) != _telling(_written(stage), stage.config):
        raise ConfigError(
            f"stage `{stage.name}` was begun with another configuration",
            where=str(kept),
            fix=OTHERWISE,
        )
    for name in () if isinstance(stage.config, RunConfig) else named_files(anchored(stage.config)):
        before = _digests(folder).get(name)
        if before is not None and (not Path(name).is_file() or before != digest(Path(name))):
            what = f"stage `{stage.name}` was begun when this file was there and said something else"
            raise ConfigError(what, where=name, fix=OTHERWISE)


def _telling(data: Any, config: Config) -> Any:
    """What of a written configuration may not change on the way: how rows are worked on may."""
    if isinstance(config, RunConfig):
        return data
    return {**{key: data[key] for key in data if key not in WORKING}, "run": {"seed": data["run"]["seed"]}}


def _digests(folder: Path) -> dict[str, str]:
    """What the files that a stage reads were when it was begun."""
    info = folder / "run.json"
    found: dict[str, str] = json.loads(info.read_text("utf-8"))["data"] if info.exists() else {}
    return found


def _written(stage: Stage) -> object:
    """The stage's configuration as its run folder keeps it."""
    return parse(dump(redact(resolved(anchored(stage.config)))), stage.name).data
