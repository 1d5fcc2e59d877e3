"""What is installed, in words: lists, health, explanations."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from prefopt.batch import COLUMNS, OUTPUTS, Needs
from prefopt.components import Algorithm, Component
from prefopt.errors import ConfigError, did_you_mean
from prefopt.plugins import CORE, Plugins
from prefopt.registry import Entry, field_docs

EMPTY = "No plugin is installed beside the core. `prefopt plugins list --all` shows the core's own components."


def listing(plugins: Plugins, everything: bool, as_json: bool) -> str:
    """The components, as a table or as JSON."""
    entries = [e for e in plugins.registry.all() if everything or e.distribution != CORE]
    facts = [_facts(entry) for entry in entries]
    if as_json:
        return json.dumps(facts, indent=1, ensure_ascii=False)
    return "\n".join([*(_table(facts) if facts else [EMPTY]), *_unloaded(plugins)])


def _table(facts: list[dict[str, str]]) -> Iterator[str]:
    """A line for each component; below it where it comes from: its paper and its source."""
    rows = [(f["kind"], f["name"], f"{f['distribution']} {f['version']}") for f in facts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, f in zip(rows, facts, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join([*cells, f["summary"]]).rstrip()
        yield "    " + ", ".join(part for part in (f["paper"], f["source"]) if part)


def _unloaded(plugins: Plugins) -> Iterator[str]:
    names = sorted({b.distribution for b in plugins.registry.broken})
    if names:
        yield f"Not loaded: {', '.join(names)}. `prefopt plugins doctor` says why."


def _facts(entry: Entry) -> dict[str, str]:
    return {
        "kind": entry.cls.kind,
        "name": entry.cls.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "summary": entry.cls.summary(),
        "paper": entry.cls.paper,
        "source": entry.source,
    }


def examine(plugins: Plugins) -> tuple[bool, list[str]]:
    """Whether all is well, and what was found."""
    registry = plugins.registry
    broken = [f"broken: {b}" for b in registry.broken]
    clashes = [
        f"clash: {kind} `{name}` is offered by {', '.join(e.distribution for e in entries)}"
        for (kind, name), entries in registry.entries.items()
        if len(entries) > 1
    ]
    hidden = [f"not allowed to load: {name}" for name in sorted(set(registry.hidden))]
    remarks = list(_remarks(plugins))
    owners = sorted({(e.distribution, e.version) for e in registry.all()})
    loaded = [f"loaded: {name} {version}" for name, version in owners]
    return not broken and not clashes, [*loaded, *broken, *clashes, *hidden, *remarks]


def _remarks(plugins: Plugins) -> Iterator[str]:
    if "torch" in sys.modules:
        yield "remark: loading plugins imports torch, so every command starts slowly; see `lazy_import` in prefopt.api"
    for entry in plugins.registry.all():
        if isinstance(entry.cls, type) and issubclass(entry.cls, Algorithm) and not entry.cls.formula:
            yield f"remark: algorithm `{entry.cls.name}` ({entry.distribution}) has no formula to explain"


def explanation(plugins: Plugins, name: str, kind: str | None) -> str:
    """Everything known about a component of this name. Raises `ConfigError` when there is none."""
    entries = [e for e in plugins.registry.all() if e.cls.name == name and kind in (None, e.cls.kind)]
    if not entries:
        known = [e.cls.name for e in plugins.registry.all() if kind in (None, e.cls.kind)]
        raise ConfigError(f"no component is called `{name}`", fix=did_you_mean(name, known))
    return "\n\n".join("\n".join(_explain(entry)) for entry in entries)


def _explain(entry: Entry) -> Iterator[str]:
    cls = entry.cls
    yield f"{cls.kind} {cls.name} - {cls.summary()}"
    yield f"  from        {entry.distribution} {entry.version}, {entry.source}"
    if cls.paper:
        yield f"  paper       {cls.paper}"
    if issubclass(cls, Algorithm):
        yield from _explain_algorithm(cls)
    yield from _explain_settings(cls)


def _explain_algorithm(cls: type[Algorithm]) -> Iterator[str]:
    yield f"  learns from {cls.eats.kind} rows"
    if cls.formula:
        yield f"  formula     {cls.formula}"
    if cls.dialect:
        yield f"  dialect     {cls.dialect}"
    try:
        yield from _explain_needs(cls.model_construct().needs())
    except Exception:  # it reads a setting that has no default
        yield "  needs       depends on its settings"
    for difference in cls.differences:
        yield f"  differs     {difference}"


def _explain_needs(needs: Needs) -> Iterator[str]:
    for name in sorted(needs.columns):
        yield f"  needs       {name}: {COLUMNS[name]}, without gradient"
    for name in sorted(needs.during):
        yield f"  needs       {name}: {OUTPUTS[name]}, with gradient"
    for name in sorted(needs.rows):
        yield f"  needs       {name}: a number of each row"


def _explain_settings(cls: type[Component]) -> Iterator[str]:
    docs = field_docs(cls)
    properties: dict[str, Any] = cls.model_json_schema().get("properties", {})
    for name, field in cls.model_fields.items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        limits = ", ".join(
            f"{word} {properties[name][key]}" for key, word in _LIMITS.items() if key in properties[name]
        )
        facts = ", ".join(part for part in (default, limits) if part)
        yield f"  setting     {name} ({facts}): {docs.get(name, '')}".rstrip(": ")


_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "enum": "one of",
}
