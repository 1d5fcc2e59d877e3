"""Reads a constitution: the principles in a YAML file, or everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path

from prefopt.components import Component
from prefopt.config.load import validated
from prefopt.config.making import Constitution
from prefopt.config.yaml import Document, read
from prefopt.errors import ConfigError, Problem
from prefopt.revising import Principle


def read_constitution(path: str, compare: bool = False) -> tuple[Principle, ...]:
    """The principles in a file; with `compare`, each must say what makes one reply better. Raises `ConfigError` with
    the place of each problem."""
    document = read(Path(path))
    found = validated(Constitution, document, _no_component)
    problems = list(_repeated(found, document))
    if compare:
        problems += _silent(found, document)
    if problems:
        raise ConfigError(*problems)
    return found.principles


def _repeated(found: Constitution, document: Document) -> list[Problem]:
    names = [principle.id for principle in found.principles]
    return [
        Problem(f"two principles are called `{name}`", document.where(("principles", i, "id")))
        for i, name in enumerate(names)
        if name in names[:i]
    ]


def _silent(found: Constitution, document: Document) -> list[Problem]:
    fix = "Write `compare`: what makes one of two replies better by this principle."
    return [
        Problem(f"principle `{p.id}` does not say how replies are compared", document.where(("principles", i)), fix)
        for i, p in enumerate(found.principles)
        if p.compare is None
    ]


def _no_component(kind: str, name: str) -> type[Component]:
    raise ConfigError(f"a constitution names no {kind}")
