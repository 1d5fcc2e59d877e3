"""Changes every method in small ways and asks whether the conformance kit notices.

    python benchmarks/mutation.py OUT.json

A mutant is one change in one place of a method's functions: a sign, an operator, a lost stop_gradient, chosen and
rejected exchanged, a sum for a mean, another unit, a number off by one, a comparison that takes or leaves equality, a
setting replaced by its default. It is killed when a property of the kit fails for a method that has the changed class
among its own, at its defaults or at the other settings that its plugin tests, when a pinned number changes, or when it
cannot run; properties alone and both together are counted. The core's own methods are among them. Left out: messages
and, for time, properties that go through the engine. Reasons why a survivor is none that matters are taken over from
OUT.json.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import runpy
import sys
import types
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from typing import Any

import torch

from prefopt.api import Algorithm
from prefopt.testing import kit
from prefopt.testing.pins import pin
from prefopt.testing.settings import label

ROOT = Path(__file__).parents[1]
PLUGINS = {"prefopt_dpo": "prefopt-dpo", "prefopt_orpo": "prefopt-orpo", "prefopt_kto": "prefopt-kto"}
CORE = "prefopt.builtin.algorithms"
CHECKS = {name: check for name, check in kit.PROPERTIES.items() if not name.startswith("engine")}
SWAPS = {"chosen": "rejected", "rejected": "chosen", "mean_tokens": "sum_tokens", "sum_tokens": "mean_tokens"}
UNITS = {"pairs": "sequences", "sequences": "groups", "groups": "sequences", "tokens": "sequences"}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


def changes(node: ast.AST, defaults: dict[str, Any]) -> Iterator[tuple[str, ast.AST]]:
    """What may take the place of a node, each with its name."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield "operator", ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", node.operand
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "stop_gradient":
        yield "detach", node.args[0]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "comparison", ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in ("chosen", "rejected"):
        yield "swap", ast.Name(SWAPS[node.id], ast.Load())
    if isinstance(node, ast.Attribute) and node.attr in ("mean_tokens", "sum_tokens"):
        yield "mean", ast.Attribute(node.value, SWAPS[node.attr], node.ctx)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and node.attr in defaults:
        yield "field", ast.Constant(defaults[node.attr])
    if isinstance(node, ast.Constant) and node.value in UNITS:
        yield "unit", ast.Constant(UNITS[node.value])
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        yield "number", ast.Constant(node.value + 1)


def mutants(source: str, defaults: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Every mutant of a file: its name, its class (empty for a function outside of one), its source."""
    tree = ast.parse(source)
    for path, function in _functions(tree):
        cls = path.rpartition(".")[0]
        for place, node in enumerate(ast.walk(function)):
            if _said_to_people(node, function):
                continue
            for kind, new in changes(node, defaults.get(cls, {})):
                changed = copy.deepcopy(tree)
                _replace(dict(_functions(changed))[path], place, new)
                name = f"{path}:{getattr(node, 'lineno', 0)} {kind}: {ast.unparse(node)} -> {ast.unparse(new)}"
                yield name, cls, ast.unparse(ast.fix_missing_locations(changed))


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """All functions but those that only declare, by their names."""
    for outer in tree.body:
        if isinstance(outer, ast.FunctionDef) and not outer.name.startswith("prefopt_"):
            yield outer.name, outer
        for inner in outer.body if isinstance(outer, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef) and inner.name not in ("needs", "loss_at_init"):
                yield f"{outer.name}.{inner.name}", inner


def _said_to_people(node: ast.AST, function: ast.FunctionDef) -> bool:
    """Whether a node is part of a message."""
    messages = (n for n in ast.walk(function) if isinstance(n, ast.Raise | ast.JoinedStr))
    return any(inner is node for message in messages for inner in ast.walk(message))


def _replace(function: ast.FunctionDef, place: int, new: ast.AST) -> None:
    target = list(ast.walk(function))[place]

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if node is target else self.generic_visit(node)

    Put().visit(function)


class Mutated(Loader, MetaPathFinder):
    """Imports one module from a changed source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(name, self, origin=str(self.path)) if name == self.name else None

    def exec_module(self, module: types.ModuleType) -> None:
        exec(compile(self.source, str(self.path), "exec"), vars(module))

    def methods(self) -> Sequence[type[Algorithm]]:
        """Those of the plugin, or of this module of the core: the core itself stays as it is."""
        if self.name != CORE:
            return self.package().METHODS  # type: ignore[no-any-return]
        module = types.ModuleType(self.name)
        self.exec_module(module)
        kinds = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Algorithm)]
        return [x for x in kinds if x.__module__ == self.name]

    def package(self) -> types.ModuleType:
        """The whole package, anew."""
        package = self.name.partition(".")[0]
        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            del sys.modules[name]
        sys.meta_path.insert(0, self)
        try:
            return import_module(package)
        finally:
            sys.meta_path.remove(self)


def survives(mutated: Mutated, cls: str, pins: dict[str, Any], others: list[Algorithm]) -> tuple[bool, bool]:
    """Whether the properties let a mutant live, and whether the pinned numbers do too."""
    try:
        methods = [m for m in mutated.methods() if not cls or cls in (base.__name__ for base in m.__mro__)]
        made = [method() for method in methods]
        made += [m.model_validate(other.model_dump()) for other in others for m in methods if m.name == other.name]
        alive = not any(kit._failure(name, algorithm) for algorithm in made for name in CHECKS)
        return alive, alive and all(_same(pin(algorithm), pins[label(algorithm)]) for algorithm in made)
    except Exception:  # a mutant that cannot even run is dead
        return False, False


def _numbers(cls: type[Algorithm]) -> dict[str, Any]:
    """The defaults of its settings that are numbers."""
    return {name: f.default for name, f in cls.model_fields.items() if isinstance(f.default, int | float)}


def _same(a: dict[str, float], b: dict[str, float]) -> bool:
    return a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-9 * max(1.0, abs(b[k])) for k in a)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    kit.installed()
    before = json.loads(out.read_text("utf-8"))["survivors"] if out.exists() else []
    reasons = {_plain(found["mutant"]): found["reason"] for found in before}
    counts = {"mutants": 0, "killed_by_properties": 0, "killed_with_pins": 0}
    survivors, pins_alone = [], []
    for name, alive, pinned in judged():
        counts["mutants"] += 1
        counts["killed_by_properties"] += not alive
        counts["killed_with_pins"] += not pinned
        if pinned:
            survivors.append({"mutant": name, "reason": reasons.get(_plain(name), "")})
            print(name, counts, flush=True)
        elif alive:
            pins_alone.append(name)
    found = {**counts, "survivors": survivors, "killed_by_pins_alone": pins_alone}
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def judged() -> Iterator[tuple[str, bool, bool]]:
    """The name of each mutant, and what `survives` says of it."""
    for module, path, tests in sources():
        others = list(runpy.run_path(str(tests))["OTHERS"])
        pins = json.loads(tests.with_name("pins.json").read_text("utf-8"))
        kinds = vars(import_module(module)).items()
        defaults = {n: _numbers(c) for n, c in kinds if isinstance(c, type) and issubclass(c, Algorithm)}
        for name, cls, source in mutants(path.read_text("utf-8"), defaults):
            yield f"{path.stem}.{name}", *survives(Mutated(module, path, source), cls, pins, others)


def sources() -> Iterator[tuple[str, Path, Path]]:
    """Each module with methods, its file, and the test that names their other settings."""
    yield CORE, ROOT / "prefopt/builtin/algorithms.py", ROOT / "tests/builtin/test_algorithms.py"
    for package, name in PLUGINS.items():
        folder = ROOT / "plugins" / name
        for path in sorted((folder / "src" / package).glob("*.py")):
            if path.stem != "__init__":
                yield f"{package}.{path.stem}", path, folder / "tests/test_conformance.py"


def _plain(mutant: str) -> str:
    """Its name without the line, which moves."""
    return re.sub(r":\d+ ", " ", mutant, count=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
