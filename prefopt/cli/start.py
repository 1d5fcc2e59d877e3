"""Writes what a user starts from: configurations, the schema, a plugin."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import prefopt
from prefopt import api
from prefopt.config import schema
from prefopt.errors import ConfigError, ResourceError, did_you_mean
from prefopt.plugins import load
from prefopt.registry import field_docs

PACKAGE = Path(prefopt.__file__).parent
RECIPES = PACKAGE / "recipes"
TEMPLATE = PACKAGE / "cli" / "template"
SCHEMA = ".prefopt/schema.json"
PLUGIN_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


def write_recipe(folder: Path, recipe: str) -> Iterator[str]:
    """Writes the configurations of a recipe and the schema their editor reads. Nothing is ever overwritten."""
    known = sorted(path.name for path in RECIPES.iterdir() if path.is_dir())
    if recipe not in known:
        raise ConfigError(f"unknown recipe `{recipe}`", fix=did_you_mean(recipe, known))
    texts = {folder / path.name: path.read_text("utf-8") for path in sorted((RECIPES / recipe).glob("*.yaml"))}
    _write({**texts, folder / SCHEMA: schema_text() + "\n"})
    yield from (f"wrote {path}" for path in texts)
    first = next(line for text in texts.values() for line in text.splitlines() if "Step 1" in line)
    yield first.removeprefix("# ")
    where = f"cd {folder} && " if folder != Path(".") else ""
    yield f"next: {where}prefopt train {_first_step(texts)}"


def _first_step(texts: dict[Path, str]) -> str:
    return next(path.name for path, text in texts.items() if "Step 1" in text)


def _write(texts: dict[Path, str]) -> None:
    """Writes files, or none of them when one exists."""
    present = [str(path) for path in texts if path.exists()]
    if present:
        raise ConfigError(f"would overwrite {', '.join(present)}", fix="Choose an empty folder.")
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write {error.filename}: {error.strerror}") from None


def schema_text() -> str:
    """The JSON schema of a run with the installed plugins."""
    components = [entry.cls for entry in load().registry.all()]
    return json.dumps(schema(components, field_docs), indent=1, ensure_ascii=False)


def write_plugin(name: str, folder: Path) -> Iterator[str]:
    """Writes `folder/prefopt-NAME`, an installable plugin with one method to fill in."""
    if not PLUGIN_NAME.fullmatch(name):
        raise ConfigError(
            f"`{name}` cannot name a plugin", fix="Use lower-case words joined by `_`, such as `my_method`."
        )
    words = re.split(r"[_-]", name)
    _refuse_taken("_".join(words))
    forms = {"example_method": "_".join(words), "ExampleMethod": "".join(map(str.capitalize, words))}
    forms |= {"prefopt-example": f"prefopt-{'-'.join(words)}", "prefopt_example": f"prefopt_{'_'.join(words)}"}
    root = folder / forms["prefopt-example"]
    texts = {}
    for path in sorted(p for p in TEMPLATE.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        relative = _filled(str(path.relative_to(TEMPLATE)), forms)
        texts[root / relative] = _filled(path.read_text("utf-8"), forms)
    _write(texts)
    method = next(str(path) for path in texts if path.name == "method.py")
    yield f"wrote {root}"
    yield f"1. pip install -e {root}"
    yield f"2. write the loss in {method}"
    yield f"3. pytest {root}"


def _refuse_taken(name: str) -> None:
    """A method needs a name of its own: neither that of an installed component, nor one that its module imports."""
    plain = name.replace("_", "")
    owner = next((e for e in load().registry.all() if e.cls.name.replace("-", "_") == name), None)
    if owner is not None:
        what = f"`{name}` is taken: {owner.distribution} uses it for its {owner.cls.kind}"
        raise ConfigError(what, fix="Choose another name: two plugins that offer one name clash.")
    if plain in {word.lower() for word in (*api.__all__, "PositiveFloat")}:
        raise ConfigError(
            f"`{name}` has a meaning in the module of a method", fix=f"Choose another, such as my_{name}."
        )


def _filled(text: str, forms: dict[str, str]) -> str:
    for placeholder, value in forms.items():
        text = text.replace(placeholder, value)
    return text
