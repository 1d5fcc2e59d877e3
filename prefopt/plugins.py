"""Loads plugins, one entry point at a time. A plugin that breaks is kept with its reason and hurts nobody else.

A plugin is code with your rights: it is imported when it is installed and allowed. `PREFOPT_PLUGINS=a,b` and the
configuration's `plugins: {allow: [...]}` limit which distributions may load; the core's own components always do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from prefopt import hookspecs
from prefopt.components import (
    Algorithm,
    Component,
    DataSource,
    Judge,
    RewardSource,
    Sampler,
    Task,
    World,
)
from prefopt.registry import BrokenPlugin, Registry, normalised
from prefopt.revising import Reviser

GROUP = "prefopt"
CORE = "prefopt"
HOOKS: dict[str, type[Component]] = {
    "prefopt_algorithms": Algorithm,
    "prefopt_rewards": RewardSource,
    "prefopt_judges": Judge,
    "prefopt_revisers": Reviser,
    "prefopt_datasets": DataSource,
    "prefopt_samplers": Sampler,
    "prefopt_tasks": Task,
    "prefopt_worlds": World,
}


@dataclass(frozen=True)
class Plugins:
    """What is installed: component classes by name, and the hooks of every plugin that loaded."""

    registry: Registry
    manager: pluggy.PluginManager

    def find(self, kind: str, name: str) -> type[Component]:
        """The class of a component. Raises `PrefoptError` for a name that cannot be resolved."""
        return self.registry.find(kind, name).cls

    def notify(self, hook: str, on_error: Callable[[str, Exception], None], **arguments: Any) -> None:
        """Calls an observer hook in each plugin; what one raises is handed to `on_error` and stops nobody."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                names = implementation.argnames
                implementation.function(**{name: arguments[name] for name in names})
            except Exception as error:
                on_error(implementation.plugin_name, error)


def allowed_from_environment() -> Collection[str] | None:
    """The distributions named in `PREFOPT_PLUGINS`; None when it is not set."""
    value = os.environ.get("PREFOPT_PLUGINS")
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def load(allow: Collection[str] | None = None, whole: bool = True) -> Plugins:
    """Every allowed plugin in this environment. Never raises for a plugin's fault: see `Registry.broken`.

    Not `whole`, components are asked for when one of their kind is first looked up, and the settings of each are
    checked when it is: what a short command has time for. A plugin of which one hook fails is then without that kind
    alone.
    """
    limits = [set(map(normalised, limit)) for limit in (allow, allowed_from_environment()) if limit is not None]
    plugins = Plugins(Registry(), _new_manager())
    for entry in sorted(entry_points(group=GROUP), key=_load_order):
        name, _ = _owner(entry)
        if name != CORE and any(normalised(name) not in limit for limit in limits):
            plugins.registry.hidden.append(name)
            continue
        with _kept_apart(plugins.registry, entry):
            _load_one(entry, plugins, whole)
    return plugins


@contextmanager
def _kept_apart(registry: Registry, entry: EntryPoint) -> Iterator[None]:
    """What fails in here is a broken plugin, and nothing else."""
    try:
        yield
    except (Exception, SystemExit) as error:
        registry.broken.append(BrokenPlugin(entry.name, *_owner(entry), f"{type(error).__name__}: {error}"))


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("prefopt")
    manager.add_hookspecs(hookspecs)
    return manager


def _load_order(entry: EntryPoint) -> tuple[bool, str, str]:
    name, _ = _owner(entry)
    return name != CORE, name, entry.name


@cache
def _owner(entry: EntryPoint) -> tuple[str, str]:
    """Name and version of its distribution, whose metadata are parsed anew whenever they are asked for."""
    metadata = entry.dist.metadata if entry.dist else {"Name": "unknown", "Version": "?"}
    return metadata["Name"], metadata["Version"]


def _load_one(entry: EntryPoint, plugins: Plugins, whole: bool) -> None:
    """Imports, checks and registers one plugin; nothing of it stays behind when a check fails."""
    module = entry.load()
    known = plugins.manager.get_name(module)
    if known is not None:
        raise ValueError(f"`{entry.value}` is loaded already, as `{known}`")
    try:
        plugins.manager.register(module, f"{_owner(entry)[0]}:{entry.name}")
        hooks = _hooks(module, entry, plugins.manager)
        classes = [cls for hook, give in hooks for cls in _checked(hook, give())] if whole else []
        for cls in classes if _owner(entry)[0] != CORE else ():
            cls.model_rebuild()  # a plugin whose settings make no sense is broken here, and not when it is used
    except BaseException:
        if plugins.manager.is_registered(module):
            plugins.manager.unregister(module)
        raise
    for cls in classes:
        plugins.registry.add(cls, *_owner(entry))
    for hook, give in () if whole else hooks:
        plugins.registry.later(HOOKS[hook].kind, partial(_ask, hook, give, entry, plugins.registry))


def _ask(hook: str, give: Callable[[], Any], entry: EntryPoint, registry: Registry) -> None:
    """Asks a plugin for its components of one kind."""
    with _kept_apart(registry, entry):
        for cls in _checked(hook, give()):
            registry.add(cls, *_owner(entry))


def _hooks(module: Any, entry: EntryPoint, manager: pluggy.PluginManager) -> list[tuple[str, Callable[[], Any]]]:
    """The hooks of a plugin that contribute components."""
    manager.check_pending()  # a misspelt hook is an error, not silence
    callers = manager.get_hookcallers(module)
    if not callers:
        raise TypeError(f"`{entry.value}` implements no hook: did you forget @hookimpl?")
    own = [(caller.name, i) for caller in callers for i in caller.get_hookimpls() if i.plugin is module]
    return [(hook, i.function) for hook, i in own if hook in HOOKS]


def _checked(hook: str, given: Iterable[Any] | None) -> list[type[Component]]:
    """What a hook returned, if it is classes of its kind that can be named in a configuration."""
    kind, classes = HOOKS[hook], list(given or ())
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, kind)):
            raise TypeError(f"{hook} must return subclasses of {kind.__name__}, got {cls!r}")
        if not cls.name or not cls.name.replace("_", "a").replace("-", "a").isalnum():
            raise TypeError(f"{cls.__name__}.name must be letters, digits, `_` and `-`, got {cls.name!r}")
    return classes
