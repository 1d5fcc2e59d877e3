"""Settings of an algorithm: a name for what differs from its defaults, and other values to try. It computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from prefopt.components import Algorithm
from prefopt.testing.failure import ConformanceFailure


def label(algorithm: type[Algorithm] | Algorithm) -> str:
    """Its name, and the settings that are not the defaults."""
    if isinstance(algorithm, type):
        return algorithm.name
    changed = algorithm.model_dump(exclude_defaults=True)
    return " ".join([algorithm.name, *(f"{key}={changed[key]}" for key in sorted(changed) if key != algorithm.key)])


def default(cls: type[Algorithm]) -> Algorithm | None:
    """The algorithm as it is without settings; None when it needs some."""
    try:
        return cls()
    except ValidationError:
        return None


def instance(algorithm: type[Algorithm] | Algorithm) -> Algorithm:
    """The algorithm at its defaults, when it is a class. Raises `ConformanceFailure` where it has none."""
    if not isinstance(algorithm, type):
        return algorithm
    made = default(algorithm)
    if made is None:
        raise ConformanceFailure(f"{algorithm.__name__} has settings without defaults: pass an instance")
    return made


def others(algorithm: Algorithm, name: str) -> Iterator[Algorithm]:
    """The algorithm with other values of one setting, those that it accepts."""
    for value in _values(getattr(algorithm, name), type(algorithm).model_fields[name].annotation):
        try:
            yield type(algorithm).model_validate({**algorithm.model_dump(), name: value})
        except ValidationError:
            continue


def _values(value: Any, annotation: Any) -> Iterator[Any]:
    """Other values of a setting: other members of a literal, other numbers."""
    kinds = [annotation, *get_args(annotation)]
    for kind in kinds:
        if get_origin(kind) is Literal:
            yield from (x for x in get_args(kind) if x != value)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (
            type(value)(x) for x in (value * 2 + 1, value * 0.6, value + 0.05, value / 2 + 0.1, 0) if x != value
        )
    elif isinstance(value, Mapping):
        yield from ({k: x for k, x in value.items() if k != left_out} for left_out in value)
        yield from ({**value, k: x * 2} for k, x in value.items() if isinstance(x, int | float))
    elif isinstance(value, tuple):
        yield from (value[::-1], value[1:])
    elif value is None:
        yield from (0.3, 1, 2, 3)
