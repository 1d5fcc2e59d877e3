"""Rules of the house that can be counted."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from statistics import median, quantiles

import pytest

import prefopt
from prefopt import api

ROOT = Path(prefopt.__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("prefopt", "plugins")
    for path in (ROOT / folder).rglob("*.py")
    if "tests" not in path.parts and "template" not in path.parts
)
NAMES = [m.name for m in pkgutil.walk_packages(prefopt.__path__, "prefopt.") if "template" not in m.name]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "prefopt.__main__"])
def test_every_module_can_be_imported_and_says_what_it_is_for(name):
    assert (importlib.import_module(name).__doc__ or "").strip()


FORBIDDEN = {
    r"algorithm\.name\s*==|\.name\s*==\s*[\"'](dpo|sft|reward_model|ppo|kto|grpo)": "a method's name in the engine",
    r"\bimport pickle\b|torch\.load\(|joblib|cloudpickle|\bdill\b": "pickle",
    r"(?<![\w.])eval\(|(?<![\w.])exec\(|shell=True|yaml\.load\(": "code from data",
    r"trust_remote_code\s*=\s*True": "remote code",
    r"from transformers import .*\bTrainer\b|import trl|from trl": "another trainer",
    r"\|\s*safe\b|Markup\(": "unescaped HTML",
    r"\bTODO\b|\bFIXME\b|\bXXX\b": "unfinished work",
}


@pytest.mark.parametrize("pattern", FORBIDDEN, ids=list(FORBIDDEN.values()))
def test_what_must_not_be_in_the_source_is_not(pattern):
    files = [*SOURCES, *(ROOT / "prefopt").rglob("*.html")]
    found = [
        f"{p}:{i}" for p in files for i, line in enumerate(p.read_text().splitlines(), 1) if re.search(pattern, line)
    ]
    assert found == []


def functions() -> list[int]:
    """The length of every function, in lines."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    nodes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [n.end_lineno - n.lineno + 1 for n in nodes]


def test_functions_and_files_are_short():
    sizes = functions()
    ninety = quantiles(sizes, n=10)[-1]
    longest = max(len(path.read_text().splitlines()) for path in SOURCES)
    print(f"{len(sizes)} functions: median {median(sizes)}, 90th percentile {ninety}; longest file {longest} lines")
    assert median(sizes) < 10
    assert ninety < 35
    assert longest < 500


def test_the_api_offers_what_it_lists():
    assert sorted(api.__all__) == api.__all__
    assert [name for name in api.__all__ if not hasattr(api, name)] == []
    public = {name for name in vars(api) if not name.startswith(("_", "@"))} - {"annotations"}
    assert public == set(api.__all__)
