"""Names to classes. Knows who contributed what; knows nothing about how plugins are found or configurations are
read."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from prefopt.components import Algorithm, Component, DataSource, Judge, RewardSource, Sampler, Task, World
from prefopt.errors import ConfigError, PluginError, did_you_mean
from prefopt.revising import Reviser

KINDS: tuple[type[Component], ...] = (Algorithm, RewardSource, Judge, Reviser, DataSource, Sampler, Task, World)


def normalised(distribution: str) -> str:
    """The name of a distribution as installers compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@dataclass(frozen=True, slots=True)
class Entry:
    """A component class and the distribution that contributed it."""

    cls: type[Component]
    distribution: str
    version: str

    @property
    def source(self) -> str:
        """`file:line` of the class."""
        try:
            return f"{inspect.getsourcefile(self.cls)}:{inspect.getsourcelines(self.cls)[1]}"
        except (OSError, TypeError):
            return self.cls.__module__


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """An entry point that could not be loaded, and why."""

    entry_point: str
    distribution: str
    version: str
    reason: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (entry point `{self.entry_point}`): {self.reason}"


@dataclass
class Registry:
    """Component classes by kind and name."""

    entries: dict[tuple[str, str], list[Entry]] = field(default_factory=dict)
    broken: list[BrokenPlugin] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    """Distributions that an allow-list kept from loading."""
    pending: dict[str, list[Callable[[], None]]] = field(default_factory=dict)
    """What adds components of a kind, to be called when one is first looked up."""

    def later(self, kind: str, fill: Callable[[], None]) -> None:
        self.pending.setdefault(kind, []).append(fill)

    def add(self, cls: type[Component], distribution: str, version: str) -> None:
        self.entries.setdefault((cls.kind, cls.name), []).append(Entry(cls, distribution, version))

    def names(self, kind: str) -> list[str]:
        self._fill(kind)
        return sorted(name for k, name in self.entries if k == kind)

    def all(self) -> Iterator[Entry]:
        for kind in KINDS:
            for name in self.names(kind.kind):
                yield from self.entries[kind.kind, name]

    def find(self, kind: str, name: str) -> Entry:
        """The one component of this kind called `name` or `distribution:name`.

        Raises `ConfigError` for an unknown name, `PluginError` when a broken plugin stands behind it, two plugins
        claim it, or its settings make no sense.
        """
        owner, _, plain = name.rpartition(":")
        wanted = normalised(owner)
        self._fill(kind)
        found = [e for e in self.entries.get((kind, plain), []) if wanted in ("", normalised(e.distribution))]
        if len(found) == 1:
            return _built(found[0])
        if found:
            claims = ", ".join(f"`{e.distribution}:{plain}`" for e in found)
            raise PluginError(f"two plugins offer {kind} `{plain}`", fix=f"Choose one: {claims}.")
        raise self._unknown(kind, plain, owner)

    def _fill(self, kind: str) -> None:
        for fill in self.pending.pop(kind, ()):
            fill()

    def owner(self, cls: type[Component]) -> Entry:
        """The entry of a class that was found here, whoever else offers its name."""
        return next(e for e in self.entries[cls.kind, cls.name] if e.cls is cls)

    def _unknown(self, kind: str, name: str, owner: str) -> ConfigError | PluginError:
        suspects = [b for b in self.broken if _may_offer(b, owner or name)]
        if suspects:
            return PluginError(
                f"{kind} `{name}`: its plugin could not be loaded: {suspects[0]}", fix="See `prefopt plugins doctor`."
            )
        known = [f"{owner}:{name}" if owner else name for name in self.names(kind)]
        fix = did_you_mean(name, self.names(kind) if not owner else known)
        if self.broken:
            broken = dict.fromkeys(b.distribution for b in self.broken)
            fix += f" Not loaded: {'; '.join(broken)} (`prefopt plugins doctor`)."
        if self.hidden:
            fix += f" Not allowed to load: {', '.join(sorted(self.hidden))}."
        return ConfigError(f"unknown {kind} `{f'{owner}:' if owner else ''}{name}`", fix=fix)


def _built(entry: Entry) -> Entry:
    """The entry, its settings checked: that is put off until a class is asked for."""
    try:
        entry.cls.model_rebuild()
    except Exception as error:
        what = f"{entry.cls.kind} `{entry.cls.name}` of {entry.distribution}: {type(error).__name__}: {error}"
        raise PluginError(what, fix="See `prefopt plugins doctor`.") from None
    return entry


def _may_offer(broken: BrokenPlugin, name: str) -> bool:
    words = {broken.entry_point, broken.distribution, broken.distribution.removeprefix("prefopt-")}
    return name.replace("-", "_") in {w.replace("-", "_") for w in words}


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The string under each field of a class and its bases, read from the source when it is asked for."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs.update(_own_field_docs(base))
    return {name: text for name, text in docs.items() if name in cls.model_fields}


@cache
def _own_field_docs(cls: type[Any]) -> dict[str, str]:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    statements: Iterable[ast.stmt] = getattr(body, "body", [])
    pairs = zip(statements, list(statements)[1:], strict=False)
    return {
        first.target.id: " ".join(second.value.value.split())
        for first, second in pairs
        if isinstance(first, ast.AnnAssign)
        and isinstance(first.target, ast.Name)
        and isinstance(second, ast.Expr)
        and isinstance(second.value, ast.Constant)
        and isinstance(second.value.value, str)
    }
