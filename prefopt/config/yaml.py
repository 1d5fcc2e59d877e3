"""Reads YAML 1.2 into plain data and remembers where every value stood. Knows nothing about what the values mean."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from prefopt.errors import ConfigError, Problem

Keys: TypeAlias = tuple[str | int, ...]

MAX_BYTES: Final = 1_000_000
MAX_NODES: Final = 100_000
MAX_DEPTH: Final = 50
_PLAIN: Final = (str, int, float, bool, type(None))
_OVERRIDE: Final = re.compile(r"([A-Za-z_][\w-]*(?:\.(?:[A-Za-z_][\w-]*|\d+))*)=(.*)", re.DOTALL)


@dataclass
class Document:
    """Plain data, and the place (`file:line:column`) of each value by its path of keys."""

    data: Any
    places: dict[Keys, str] = field(default_factory=dict)

    def where(self, path: Keys) -> str:
        """The place of `path`, or of the nearest thing around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")

    def at(self, *path: str | int) -> Document:
        """The part of the document under `path`, empty when there is nothing."""
        data = self.data
        for key in path:
            try:
                data = data[key]
            except (KeyError, IndexError, TypeError):
                return Document({}, {(): self.where(path)})
        size = len(path)
        places = {keys[size:]: place for keys, place in self.places.items() if keys[:size] == path}
        return Document(data, {(): self.where(path)} | places)

    def merged(self, other: Document) -> Document:
        """This document with the other's values laid over it; mappings are merged, anything else replaced.

        A mapping that names another component (`name`, `source`) replaces the old one whole.
        """
        if not (isinstance(self.data, dict) and isinstance(other.data, dict)) or _renames(self.data, other.data):
            return other
        out = Document(copy.deepcopy(self.data), {**self.places, (): other.where(()) or self.where(())})
        for key in other.data:
            part = self.at(key).merged(other.at(key)) if key in self.data else other.at(key)
            out.put((key,), part)
        return out

    def put(self, path: Keys, part: Document) -> None:
        """Sets the value at `path`, making mappings on the way. Raises `KeyError` where the path runs into a value."""
        target: Any = self.data
        for i, key in enumerate(path[:-1]):
            if isinstance(target, dict):
                if key not in target:
                    target[key] = {}
                    self.places[path[: i + 1]] = part.where(())
                target = target[key]
            elif isinstance(target, list) and isinstance(key, int) and key < len(target):
                target = target[key]
            else:
                raise KeyError(key)
        last: Any = path[-1]
        if not (isinstance(target, dict) or (isinstance(target, list) and last in range(len(target)))):
            raise KeyError(last)
        target[last] = part.data
        self.places = {keys: place for keys, place in self.places.items() if keys[: len(path)] != path}
        self.places.update({(*path, *keys): place for keys, place in part.places.items()})


def _renames(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return any(key in old and key in new and old[key] != new[key] for key in ("name", "source"))


def read(path: Path) -> Document:
    """The document in a file. Raises `ConfigError` with file, line and column."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"the file has {size:,} bytes, more than {MAX_BYTES:,}", where=str(path))
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text: {error.reason} at byte {error.start}", where=str(path)) from None
    except OSError as error:
        fix = "`prefopt init` writes one." if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"cannot read the file: {error.strerror}", where=str(path), fix=fix) from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """The document in `text`; `name` stands for the file in places."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(io.StringIO(text))
        reader = _Reader(name, yaml.constructor.construct_object)
        data = {} if root is None else reader.value(root, (), 0)
        reader.places.setdefault((), f"{name}:1:1")
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(f"not YAML: {error.problem or error.context}", where=where) from None
    except (YAMLError, ValueError, RecursionError) as error:
        first = (str(error) or type(error).__name__).partition("\n")[0]
        raise ConfigError(f"not YAML: {first}", where=name) from None
    if reader.problems:
        raise ConfigError(*reader.problems)
    return Document(data, reader.places)


class _Reader:
    """Turns a tree of YAML nodes into plain data, noting places and problems."""

    def __init__(self, name: str, construct: Callable[[Node], Any]) -> None:
        self.name, self.construct = name, construct
        self.places: dict[Keys, str] = {}
        self.problems: list[Problem] = []
        self.nodes = 0

    def place(self, node: Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def refuse(self, node: Node, what: str, fix: str = "") -> None:
        self.problems.append(Problem(what, self.place(node), fix))

    def value(self, node: Node, path: Keys, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise ConfigError("the document is too large or too deep once its aliases are expanded", where=self.name)
        self.places.setdefault(path, self.place(node))
        if isinstance(node, MappingNode):
            return self.mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            return [self.value(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
        return self.scalar(node)

    def mapping(self, node: MappingNode, path: Keys, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.value == "<<":
                self.refuse(key_node, "merge keys are not YAML 1.2", "Write the keys out, or use overrides.")
                continue
            key = self.scalar(key_node) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                self.refuse(key_node, "a key must be text", "Quote it." if isinstance(key, int | float | bool) else "")
            elif key in out:
                self.refuse(key_node, f"`{key}` is written twice")
            else:
                self.places[*path, key] = self.place(key_node)
                out[key] = self.value(value_node, (*path, key), depth + 1)
        return out

    def scalar(self, node: Node) -> Any:
        tag = str(node.tag)
        if not tag.startswith("tag:yaml.org,2002:") or "python" in tag:
            self.refuse(node, f"tags are not allowed: {tag}")
            return None
        try:
            value = self.construct(node)
        except ValueError:
            self.refuse(node, f"{str(node.value)[:60]!r} is no {tag.rpartition(':')[2]}")
            return None
        return value if isinstance(value, _PLAIN) else str(node.value)


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """The document with `section.key=value` laid over it; values are YAML. Raises `ConfigError` for bad ones, all
    at once."""
    problems = []
    out = Document(copy.deepcopy(document.data), dict(document.places))
    for text in overrides:
        match = _OVERRIDE.fullmatch(text)
        if not match:
            problems.append(Problem(f"cannot read override `{text}`", "command line", "Write section.key=value."))
            continue
        where = f"override `{match[1]}`"
        path: Keys = tuple(int(k) if k.isdigit() else k for k in match[1].split("."))
        try:
            data = parse(match[2], where).data if match[2].strip() else None
            out.put(path, Document(data, {(): where}))
        except ConfigError as error:
            problems.extend(error.problems)
        except KeyError as error:
            problems.append(Problem(f"`{match[1]}` leads nowhere: {error.args[0]!r} is not a section", where))
    if problems:
        raise ConfigError(*problems)
    return out


def dump(data: Any) -> str:
    """`data` as YAML, in the order given."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()
