"""Loads plugins, one entry point at a time. A plugin that breaks is kept with its reason and hurts nobody else.

A plugin is code with your rights: it is imported when it is installed and allowed. `PREFOPT_PLUGINS=a,b` and the
configuration's `plugins: {allow: [...]}` limit which distributions may load; the core's own components always do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
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


def load(allow: Collection[str] | None = None) -> Plugins:
    """Every allowed plugin in this environment. Never raises for a plugin's fault: see `Registry.broken`."""
    limits = [set(map(normalised, limit)) for limit in (allow, allowed_from_environment()) if limit is not None]
    plugins = Plugins(Registry(), _new_manager())
    for entry in sorted(entry_points(group=GROUP), key=_load_order):
        name, version = _owner(entry)
        if name != CORE and any(normalised(name) not in limit for limit in limits):
            plugins.registry.hidden.append(name)
            continue
        try:
            _load_one(entry, name, version, plugins)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            plugins.registry.broken.append(BrokenPlugin(entry.name, name, version, reason))
    return plugins


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


def _load_one(entry: EntryPoint, name: str, version: str, plugins: Plugins) -> None:
    """Imports, checks and registers one plugin; nothing of it stays behind when a check fails."""
    module = entry.load()
    known = plugins.manager.get_name(module)
    if known is not None:
        raise ValueError(f"`{entry.value}` is loaded already, as `{known}`")
    trial = _new_manager()
    trial.register(module, entry.name)
    trial.check_pending()  # a misspelt hook is an error, not silence
    if not trial.get_hookcallers(module):
        raise TypeError(f"`{entry.value}` implements no hook: did you forget @hookimpl?")
    classes = [_checked(cls, hook, kind) for hook, kind in HOOKS.items() for cls in _contributed(trial, hook)]
    for cls in classes if name != CORE else ():
        cls.model_rebuild()  # a plugin whose settings make no sense is broken here, and not when it is used
    plugins.manager.register(module, f"{name}:{entry.name}")
    for cls in classes:
        plugins.registry.add(cls, name, version)


def _contributed(manager: pluggy.PluginManager, hook: str) -> list[Any]:
    return [cls for classes in getattr(manager.hook, hook)() for cls in classes]


def _checked(cls: Any, hook: str, kind: type[Component]) -> type[Component]:
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise TypeError(f"{hook} must return subclasses of {kind.__name__}, got {cls!r}")
    if not cls.name or not cls.name.replace("_", "a").replace("-", "a").isalnum():
        raise TypeError(f"{cls.__name__}.name must be letters, digits, `_` and `-`, got {cls.name!r}")
    return cls
