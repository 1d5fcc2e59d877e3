"""From a file to a configuration, or to every problem it has, each with its place. The registry comes as an
argument."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from prefopt.components import NO_PART, Component, DataSource, UserPath
from prefopt.config.making import MAKING
from prefopt.config.models import DataConfig, MixConfig, RowsConfig, RunConfig, Section, SuiteConfig
from prefopt.config.yaml import Document, Keys, apply_overrides, read
from prefopt.errors import REDACTED, ConfigError, PrefoptError, Problem, did_you_mean, redact

Find = Callable[[str, str], type[Component]]
"""(kind, name) to a component class; raises `PrefoptError` for a name it cannot resolve."""
M = TypeVar("M", bound=Section)
B = TypeVar("B", bound=BaseModel)
E = TypeVar("E", bound=PrefoptError)
IS_PATH: Final = get_args(UserPath)[1]

ELSEWHERE: Final = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "output_dir": "dir",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "adam_epsilon": "eps",
    "max_seq_length": "max_length",
    "model_name_or_path": "path",
    "algo": "algorithm",
    "method": "algorithm",
    "dataset": "data",
}
"""What other tools call a key of ours."""


def load_run(path: Path, find: Find, overrides: Sequence[str] = ()) -> RunConfig:
    """The run in a YAML file. Raises `ConfigError` with all its problems, `PluginError` when a named plugin is
    broken."""
    return run_from(read_document(path, overrides), find)


def read_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """A YAML file with overrides laid over it, not yet understood."""
    return apply_overrides(read(path), overrides)


def load_suite(path: Path, find: Find, overrides: Sequence[str] = ()) -> tuple[SuiteConfig, Document]:
    """The suite in a YAML file, and the document, whose parts become runs."""
    document = read_document(path, overrides)
    return validated(SuiteConfig, document, find), document


def run_from(document: Document, find: Find) -> RunConfig:
    """The run in a document."""
    return validated(RunConfig, document, find)


def allowed_plugins(path: Path, overrides: Sequence[str] = ()) -> tuple[str, ...] | None:
    """`plugins: {allow: [...]}` of a file, read before any plugin is loaded; None when it says nothing usable."""
    try:
        return allowed_in(read_document(path, overrides))
    except PrefoptError:
        return None


def allowed_in(document: Document) -> tuple[str, ...] | None:
    """The same of a document."""
    allow = document.at("plugins", "allow").data
    return tuple(name for name in allow if isinstance(name, str)) if isinstance(allow, list) else None


def resolved(config: Section) -> dict[str, Any]:
    """A configuration as plain data with every default written out; it loads again to the same run. It may hold
    secrets: what is written or shown goes through `redact` first."""
    data: dict[str, Any] = json.loads(json.dumps(config.model_dump(mode="json")))
    return data


def anchored(section: B) -> B:
    """The same settings with the path of every file or folder that exists made absolute, so that they hold in any
    working directory."""
    update = {name: _anchored(field, getattr(section, name)) for name, field in type(section).model_fields.items()}
    return section.model_copy(update=update)


def _anchored(field: FieldInfo, value: Any) -> Any:
    if isinstance(value, BaseModel):
        return anchored(value)
    if isinstance(value, tuple):
        return tuple(_anchored(field, item) for item in value)
    if isinstance(value, str) and IS_PATH in _marks(field) and os.path.exists(value):
        return os.path.abspath(value)
    return value


def parts_of(node: Any) -> Iterator[Any]:
    """A configuration, or several, and everything in it."""
    yield node
    if isinstance(node, BaseModel):
        parts: Any = (getattr(node, name) for name in type(node).model_fields)
    elif isinstance(node, Mapping):
        parts = node.values()
    else:
        parts = node if isinstance(node, list | tuple) else ()
    for part in parts:
        yield from parts_of(part)


def named_files(config: Any) -> list[str]:
    """The files that results depend on: those that fields of a configuration name, and what components say they
    read."""
    sections = [part for part in parts_of(config) if isinstance(part, BaseModel)]
    fields = ((part, *item) for part in sections for item in type(part).model_fields.items())
    paths = ((getattr(part, name), _marks(field)) for part, name, field in fields)
    values = (value for value, marks in paths if IS_PATH in marks and NO_PART not in marks)
    texts = (text for value in values for text in (value if isinstance(value, tuple) else (value,)))
    named = {text for text in texts if isinstance(text, str) and Path(text).expanduser().is_file()}
    return sorted(named.union(*(part.files for part in sections if isinstance(part, Component))))


def _marks(field: FieldInfo) -> tuple[Any, ...]:
    """What is noted beside the type of a field, or beside one of its alternatives."""
    inner = (getattr(part, "__metadata__", ()) for part in get_args(field.annotation))
    return (*field.metadata, *chain(*inner))


def redacted_keys(data: Any, path: Keys = ()) -> Iterator[Keys]:
    """The keys whose values were left out when this plain data was written."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if REDACTED in str(key) or (isinstance(value, str) and REDACTED in value):
            yield (*path, key)
        yield from redacted_keys(value, (*path, key))


def validated(model: type[M], document: Document, find: Find) -> M:
    if not isinstance(document.data, dict):
        raise ConfigError("a configuration is a mapping of sections", where=document.where(()))
    failures: list[PrefoptError] = []
    try:
        text = json.dumps(document.data)
        return model.model_validate_json(text, strict=True, context={"find": _lenient(find, failures)})
    except ValidationError as error:
        flat = _flat(error.errors(include_url=False), model, ())
        problems = [_problem(path, error, inner, _Written(document, find)) for path, error, inner in flat]
        kinds = {type(f) for f in failures}
        raise (kinds.pop() if len(kinds) == 1 and len(problems) == len(failures) else ConfigError)(*problems) from None


def _lenient(find: Find, failures: list[PrefoptError]) -> Find:
    """`find` whose failures are collected and become validation errors at the place of the name."""

    def wrapped(kind: str, name: str) -> type[Component]:
        try:
            return find(kind, name)
        except PrefoptError as error:
            failures.append(error)
            problem = error.problems[0]
            raise PydanticCustomError("lookup", "lookup", {"what": problem.what, "fix": problem.fix}) from None

    return wrapped


# --- from pydantic's errors to problems -----------------------------------------------------------------------------

_Flat = tuple[Keys, Mapping[str, Any], type[BaseModel]]


def _flat(errors: Sequence[Any], model: type[BaseModel], prefix: Keys) -> Iterator[_Flat]:
    """Each error with its full path and the model it happened in; component sections carry errors of their own."""
    for error in errors:
        path = (*prefix, *error["loc"])
        if error["type"] == "component":
            yield from _flat(error["ctx"]["errors"], error["ctx"]["cls"], path)
        else:
            yield path, error, _model_at(model, error["loc"][:-1])


def _model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The model that validates the keys under `path`."""
    for key in path:
        field = model.model_fields.get(key) if isinstance(key, str) else None
        inner = _models_in(field.annotation) if field else []
        model = inner[0] if inner else model
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


@dataclass(frozen=True, slots=True)
class _Written:
    """The document a configuration was read from, and the way to look up the components it names."""

    document: Document
    find: Find

    def homes(self) -> dict[str, list[str]]:
        """The keys of each section, the algorithm's among them."""
        homes = {name: _keys(m) for name, f in RunConfig.model_fields.items() for m in _models_in(f.annotation)[:1]}
        name = self.document.at("algorithm", "name").data
        if isinstance(name, str):
            with suppress(PrefoptError):
                homes["algorithm"] = _keys(self.find("algorithm", name))
        return homes


def _problem(path: Keys, error: Mapping[str, Any], model: type[BaseModel], written: _Written) -> Problem:
    path = _as_written(path)
    where, dotted = written.document.where(path), ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        return Problem(f"unknown key `{dotted}`", where, _suggestion(str(path[-1]), path, model, written))
    if error["type"] == "missing":
        return Problem(f"`{dotted}` is missing", where)
    if error["type"] == "lookup":
        named = next((p for p in ((*path, "name"), (*path, "source")) if p in written.document.places), path)
        return Problem(f"`{dotted}`: {error['ctx']['what']}", written.document.where(named), error["ctx"]["fix"])
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    shown = "" if isinstance(error["input"], dict | list) else f", not {json.dumps(redact(error['input']))[:60]}"
    return Problem(f"`{dotted}` {message}{shown}", where)


def _as_written(path: Keys) -> Keys:
    """A data source's keys stand beside `source`, not under it."""
    drop = [i for i, key in enumerate(path[:-1]) if key == "source" and i > 0]
    return tuple(key for i, key in enumerate(path) if i not in drop)


def _keys(model: type[BaseModel]) -> list[str]:
    return [key for key in model.model_fields if not (issubclass(model, RowsConfig) and key == "source")]


def _suggestion(key: str, path: Keys, model: type[BaseModel], written: _Written) -> str:
    """The key that was probably meant: one known here under another name, else the section that has it."""
    known = _keys(model) + (_keys(DataConfig) if issubclass(model, DataSource) else [])
    usual = get_close_matches(key, ELSEWHERE, n=1, cutoff=0.85)
    if usual and ELSEWHERE[usual[0]] in known:
        return f"It is called `{ELSEWHERE[usual[0]]}` here."
    home = next((name for name, keys in written.homes().items() if key in keys and name not in path), None)
    return f"It belongs into `{home}`." if home else did_you_mean(key, known)


def located(error: E, where: Callable[[Keys], str]) -> E:
    """The same error, its dotted keys (`model.path`) replaced by their places in a document."""
    PrefoptError.__init__(error, *(_located(problem, where) for problem in error.problems))
    return error


def _located(problem: Problem, where: Callable[[Keys], str]) -> Problem:
    dotted, comma, rest = problem.where.partition(", ")
    keys = tuple(dotted.split("."))
    place = where(keys) if _is_key(keys) else ""
    return replace(problem, what=f"`{dotted}`: {problem.what}", where=f"{place}{comma}{rest}") if place else problem


def _is_key(keys: Sequence[str]) -> bool:
    """Whether a run or a stage has this key; `data.jsonl` is a file."""
    return any(_has_key(model, keys) for model in (RunConfig, *MAKING.values()))


def _has_key(model: type[BaseModel], keys: Sequence[str]) -> bool:
    for key in keys:
        if key not in model.model_fields:
            return False
        model = next(iter(_models_in(model.model_fields[key].annotation)), BaseModel)
    return True


# --- schema ---------------------------------------------------------------------------------------------------------


def schema(components: Sequence[type[Component]], describe: Callable[[type[Any]], Mapping[str, str]]) -> dict[str, Any]:
    """The JSON schema of a run, with every component in `components` spelled out; `describe` gives the text of
    fields."""
    run = TypeAdapter(RunConfig).json_schema()
    definitions = run.setdefault("$defs", {})
    models: list[type[BaseModel]] = [m for f in RunConfig.model_fields.values() for m in _models_in(f.annotation)]
    models += [RunConfig, MixConfig]
    for model in models:
        _describe(run if model is RunConfig else definitions.get(model.__name__, {}), model, describe)
    for cls in components:
        own = cls.model_json_schema()
        definitions.update(own.pop("$defs", {}))
        _describe(own, cls, describe)
        name = {"anyOf": [{"const": cls.name}, {"pattern": f"^[\\w.-]+:{re.escape(cls.name)}$"}]}
        own["properties"] = {cls.key: {**name, "description": cls.summary()}, **own.get("properties", {})}
        own["required"] = [cls.key, *own.get("required", [])]
        definitions[_definition(cls)] = own
    _merge_data_sources(definitions, [cls for cls in components if issubclass(cls, DataSource)])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_filled(run, components)}


def _definition(cls: type[Component]) -> str:
    return f"{cls.kind.replace(' ', '_')}.{cls.name}"


def _describe(schema: dict[str, Any], model: type[Any], describe: Callable[[type[Any]], Mapping[str, str]]) -> None:
    for name, text in describe(model).items():
        if name in schema.get("properties", {}):
            schema["properties"][name].setdefault("description", text)


def _merge_data_sources(definitions: dict[str, Any], sources: Sequence[type[DataSource]]) -> None:
    """In a data section the source's keys stand beside the section's own."""
    plain = {_definition(cls): definitions[_definition(cls)] for cls in sources}
    for section, suffix in (("MixConfig", ".mix"), ("DataConfig", "")):
        own = definitions[section]["properties"]
        own.pop("source")
        for name, definition in plain.items():
            definitions[name + suffix] = {**definition, "properties": {**own, **definition["properties"]}}
        definitions[section] = {"oneOf": [{"$ref": f"#/$defs/{name}{suffix}"} for name in plain]}


def _filled(node: Any, components: Sequence[type[Component]]) -> Any:
    """The schema with every placeholder for a kind replaced by its components."""
    if isinstance(node, list):
        return [_filled(item, components) for item in node]
    if not isinstance(node, dict):
        return node
    if "x-component" in node:
        rest = {k: v for k, v in node.items() if k not in ("x-component", "title")}
        names = dict.fromkeys(_definition(c) for c in components if c.kind == node["x-component"])
        return {**rest, "oneOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    return {key: _filled(value, components) for key, value in node.items()}
