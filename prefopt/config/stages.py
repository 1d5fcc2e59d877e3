"""Several runs in one file, each building on the models of those before it. Pure: nothing is run here.

What stands beside `stages` is shared by all of them; a stage lays its own sections over it. `stage:NAME` in the place
of a model's path is the model of an earlier stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prefopt.config.load import Find, run_from
from prefopt.config.models import NAME_RULE, RunConfig
from prefopt.config.yaml import Document, Keys
from prefopt.errors import ConfigError, did_you_mean

STAGE: Final = "stage:"
KINDS: Final = ("train",)
OWN: Final = ("name", "kind")
"""Keys of a stage that are not sections of a run."""


@dataclass(frozen=True)
class Stage:
    """A run of a pipeline: its name, its configuration, and the document it comes from."""

    name: str
    config: RunConfig
    document: Document

    @property
    def model(self) -> str:
        """Where its model will be."""
        return str(Path(self.config.run.dir) / "model")


def holds_stages(document: Document) -> bool:
    """Whether a document is a pipeline."""
    return isinstance(document.data, dict) and "stages" in document.data


def stages_of(document: Document, find: Find) -> list[Stage]:
    """The runs of a pipeline, in their order. Raises `ConfigError` for anything wrong in any of them."""
    listed = document.at("stages")
    if not isinstance(listed.data, list) or not listed.data:
        raise ConfigError("`stages` is a list of runs, each with a name", where=listed.where(()))
    shared = _without(document, ("stages",))
    found: list[Stage] = []
    for i in range(len(listed.data)):
        found.append(_stage(listed.at(i), shared, found, find))
    return found


def _stage(written: Document, shared: Document, before: Sequence[Stage], find: Find) -> Stage:
    name = _name(written, before)
    sections = shared.merged(_without(written, OWN))
    root = shared.at("run", "dir").data
    if not isinstance(root, str) or sections.at("run", "dir").data != root:
        what = "`run.dir` stands beside `stages`: it holds a run folder for each of them"
        raise ConfigError(what, where=sections.where(("run", "dir")))
    sections.put(("run", "dir"), Document(str(Path(root) / name), {(): shared.where(("run", "dir"))}))
    models = {f"{STAGE}{stage.name}": stage.model for stage in before}
    for asked in referred(sections.data):
        if f"{STAGE}{asked}" not in models:
            place = sections.where(path_to(f"{STAGE}{asked}", sections.data))
            raise no_stage(asked, [stage.name for stage in before], place)
    resolved = Document(replaced(sections.data, models), sections.places)
    return Stage(name, run_from(resolved, find), resolved)


def _name(written: Document, before: Sequence[Stage]) -> str:
    """The name of a stage, after its kind has been looked at."""
    data = written.data if isinstance(written.data, dict) else {}
    name, kind = data.get("name"), data.get("kind", "train")
    if not isinstance(name, str) or not NAME_RULE.fullmatch(name):
        what = "a stage has a `name` of 1 to 64 of `a-z 0-9 . _ -` that starts with a letter or digit"
        raise ConfigError(what, where=written.where(("name",)))
    if any(stage.name == name for stage in before):
        raise ConfigError(f"two stages are called `{name}`", where=written.where(("name",)))
    if kind not in KINDS:
        raise ConfigError(
            f"unknown kind of stage `{kind}`", where=written.where(("kind",)), fix=did_you_mean(str(kind), KINDS)
        )
    return name


def _without(document: Document, keys: Sequence[str]) -> Document:
    """The document without some of its keys, as one of its own."""
    out = Document({}, {(): document.where(())})
    for key in document.data:
        if key not in keys:
            out.put((key,), document.at(key))
    return out


# --- references to stages, which suites have too --------------------------------------------------------------------


def no_stage(name: str, known: Iterable[str], where: str) -> ConfigError:
    """What to say of a stage that a run refers to and that does not stand before it."""
    fix = f"Stages: {', '.join(known) or 'none yet'}."
    return ConfigError(f"there is no stage `{name}` before this run", where=where, fix=fix)


def referred(node: Any) -> list[str]:
    """Names of the stages that plain data refers to, in order, once each."""
    if isinstance(node, str):
        return [node.removeprefix(STAGE)] if node.startswith(STAGE) else []
    parts: Sequence[Any] = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    return list(dict.fromkeys(name for part in parts for name in referred(part)))


def path_to(text: str, node: Any) -> Keys:
    """Where `text` stands in plain data."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if value == text:
            return (key,)
        if path := path_to(text, value):
            return (key, *path)
    return ()


def replaced(node: Any, names: Mapping[str, str]) -> Any:
    """Plain data with some of its strings replaced by others."""
    if isinstance(node, dict):
        return {key: replaced(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [replaced(item, names) for item in node]
    return names.get(node, node) if isinstance(node, str) else node
