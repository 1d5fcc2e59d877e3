"""Several stages in one file, each building on what those before it made. Pure: nothing is run here.

What stands beside `stages` is shared by all of them; a stage lays its own sections over it. `stage:NAME` is what an
earlier stage made: in the place of a model's path the model it trained, in the place of a data file the rows it made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from prefopt.config.load import Find, run_from, validated
from prefopt.config.making import MAKING, Making, MakingSection
from prefopt.config.models import NAME_RULE, RunConfig
from prefopt.config.yaml import Document, Keys
from prefopt.errors import ConfigError, did_you_mean
from prefopt.rows import Row

STAGE: Final = "stage:"
TRAIN: Final = "train"
Config: TypeAlias = RunConfig | Making


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline: its name, its configuration, and the document it comes from."""

    name: str
    config: Config
    document: Document

    @property
    def product(self) -> str:
        """Where what it makes will be."""
        return product_of(self.config)


def product_of(config: Config) -> str:
    """Where what a stage makes will be: the folder of a model, or a file of rows."""
    return str(Path(config.run.dir) / "model" if isinstance(config, RunConfig) else config.rows)


def makes(config: Config) -> type[Row] | None:
    """The kind of rows a stage makes; None where it trains a model."""
    return None if isinstance(config, RunConfig) else config.makes


def holds_stages(document: Document) -> bool:
    """Whether a document is a pipeline."""
    return isinstance(document.data, dict) and "stages" in document.data


def stages_of(document: Document, find: Find) -> list[Stage]:
    """The stages of a pipeline, in their order. Raises `ConfigError` for anything wrong in any of them."""
    listed = document.at("stages")
    if not isinstance(listed.data, list) or not listed.data:
        raise ConfigError("`stages` is a list of runs, each with a name", where=listed.where(()))
    shared = _without(document, ("stages",))
    found: list[Stage] = []
    for i in range(len(listed.data)):
        found.append(_stage(listed.at(i), shared, found, find))
    return found


def stage_from(document: Document, find: Find) -> Config:
    """The configuration of a stage of any kind; without a `kind` it trains."""
    kind = kind_of(document)
    return run_from(_without(document, ("kind",)), find) if kind == TRAIN else validated(MAKING[kind], document, find)


def kind_of(document: Document) -> str:
    """What a stage does. Raises `ConfigError` for what no stage does."""
    kind = document.data.get("kind", TRAIN) if isinstance(document.data, dict) else TRAIN
    if kind not in (TRAIN, *MAKING):
        fix = did_you_mean(str(kind), (TRAIN, *MAKING))
        raise ConfigError(f"unknown kind of stage `{kind}`", where=document.where(("kind",)), fix=fix)
    return str(kind)


def _stage(written: Document, shared: Document, before: Sequence[Stage], find: Find) -> Stage:
    name, kind = _name(written, before), kind_of(written)
    root = shared.at("run", "dir").data
    known = shared if kind == TRAIN else _known(shared, kind)
    sections = known.merged(_without(written, ("name",)))
    if not isinstance(root, str) or sections.at("run", "dir").data != root:
        what = "`run.dir` stands beside `stages`: it holds a run folder for each of them"
        raise ConfigError(what, where=sections.where(("run", "dir")))
    sections.put(("run", "dir"), Document(str(Path(root) / name), {(): shared.where(("run", "dir"))}))
    check_references(sections, {stage.name: makes(stage.config) for stage in before})
    products = {f"{STAGE}{stage.name}": stage.product for stage in before}
    resolved = Document(replaced(sections.data, products), sections.places)
    return Stage(name, stage_from(resolved, find), resolved)


def _name(written: Document, before: Sequence[Stage]) -> str:
    data = written.data if isinstance(written.data, dict) else {}
    name = data.get("name")
    if not isinstance(name, str) or not NAME_RULE.fullmatch(name):
        what = "a stage has a `name` of 1 to 64 of `a-z 0-9 . _ -` that starts with a letter or digit"
        raise ConfigError(what, where=written.where(("name",)))
    if any(stage.name == name for stage in before):
        raise ConfigError(f"two stages are called `{name}`", where=written.where(("name",)))
    return name


def _known(shared: Document, kind: str) -> Document:
    """What of the shared sections means something to a stage that makes rows."""
    out = _only(shared, MAKING[kind].model_fields)
    out.put(("run",), _only(shared.at("run"), MakingSection.model_fields))
    return out


def _without(document: Document, keys: Sequence[str]) -> Document:
    """The document without some of its keys, as one of its own."""
    return _only(document, [key for key in document.data if key not in keys])


def _only(document: Document, keys: Sequence[str] | Mapping[str, Any]) -> Document:
    out = Document({}, {(): document.where(())})
    for key in document.data if isinstance(document.data, dict) else ():
        if key in keys:
            out.put((key,), document.at(key))
    return out


# --- references to stages, which suites have too --------------------------------------------------------------------


def check_references(document: Document, stages: Mapping[str, type[Row] | None]) -> list[str]:
    """The stages that a document refers to, in order, once each. `stages` are those before it, with the rows they make.

    Raises `ConfigError` for one that is not there, and where a model stands for rows or rows for a model.
    """
    names = []
    for path, name in _references(document.data, ()):
        if name not in stages:
            fix = f"Stages: {', '.join(stages) or 'none yet'}."
            raise ConfigError(f"there is no stage `{name}` before this run", where=document.where(path), fix=fix)
        wanted = path[0] == "data" or path[:2] == ("eval", "data")
        if wanted != (stages[name] is not None):
            made, other = ("a model", "rows") if wanted else ("rows", "a model")
            fit = [n for n, rows in stages.items() if wanted == (rows is not None)]
            raise ConfigError(
                f"`{'.'.join(map(str, path))}` wants {other}, and stage `{name}` makes {made}",
                where=document.where(path),
                fix=f"Stages that make {other}: {', '.join(fit) or 'none yet'}.",
            )
        names.append(name)
    return list(dict.fromkeys(names))


def _references(node: Any, path: Keys) -> Iterator[tuple[Keys, str]]:
    """Every reference to a stage in plain data, with its place."""
    if isinstance(node, str) and node.startswith(STAGE):
        yield path, node.removeprefix(STAGE)
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _references(value, (*path, key))


def replaced(node: Any, names: Mapping[str, str]) -> Any:
    """Plain data with some of its strings replaced by others."""
    if isinstance(node, dict):
        return {key: replaced(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [replaced(item, names) for item in node]
    return names.get(node, node) if isinstance(node, str) else node
