"""Changes every method in small ways and asks whether the conformance kit notices.

    python benchmarks/mutation.py OUT.json

A mutant is one change in one place of a method's functions: a sign, an operator, a lost stop_gradient, chosen and
rejected exchanged, a sum for a mean, another unit, a number off by one, a comparison that takes or leaves equality, a
setting replaced by its default. It is killed when a property of the kit fails for a method of that class, when a pinned
number changes, or when it cannot run; properties alone and both together are counted. Left out: the plugins' `base.py`
and functions outside classes, the core's own sft and dft, and, for time, properties that go through the engine.
"""

from __future__ import annotations

import ast
import copy
import json
import runpy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prefopt.api import Algorithm
from prefopt.testing import kit

ROOT = Path(__file__).parents[1]
PLUGINS = {"prefopt_dpo": "prefopt-dpo", "prefopt_orpo": "prefopt-orpo", "prefopt_kto": "prefopt-kto"}
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
    """Every mutant of a file: its name, its class, its source. Only what the methods' functions do is changed."""
    tree = ast.parse(source)
    for cls in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        functions = [f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name not in ("needs", "loss_at_init")]
        for function in functions:
            for place, node in enumerate(ast.walk(function)):
                if _said_to_people(node, function):
                    continue
                for kind, new in changes(node, defaults.get(cls.name, {})):
                    changed = copy.deepcopy(tree)
                    twin = next(n for n in changed.body if isinstance(n, ast.ClassDef) and n.name == cls.name)
                    body = next(f for f in twin.body if isinstance(f, ast.FunctionDef) and f.name == function.name)
                    _replace(body, place, new)
                    line = getattr(node, "lineno", 0)
                    name = f"{cls.name}.{function.name}:{line} {kind}: {ast.unparse(node)} -> {ast.unparse(new)}"
                    yield name, cls.name, ast.unparse(ast.fix_missing_locations(changed))


def _said_to_people(node: ast.AST, function: ast.FunctionDef) -> bool:
    """Whether a node is part of a message, or of a metric: nothing that a loss depends on."""
    for outer in ast.walk(function):
        people = isinstance(outer, ast.Raise) or (
            isinstance(outer, ast.Call) and getattr(outer.func, "attr", getattr(outer.func, "id", "")) in QUIET
        )
        people |= isinstance(outer, ast.Assign) and getattr(outer.targets[0], "id", "") in METRICS
        if people and any(inner is node for inner in ast.walk(outer)):
            return True
    return False


QUIET = {"warn", "record", "pair_metrics", "NotImplementedError", "metrics", "_watch", "ValueError"}
METRICS = {"metrics", "means", "kl", "right"}


def _replace(function: ast.FunctionDef, place: int, new: ast.AST) -> None:
    target = list(ast.walk(function))[place]

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if node is target else self.generic_visit(node)

    Put().visit(function)


def survives(
    source: str, package: str, path: Path, pins: dict[str, Any], cls: str, others: list[Algorithm]
) -> tuple[bool, bool]:
    """Whether the properties let a mutant live, and whether the pinned numbers do too, at defaults and at the settings
    of `others`. Methods that inherit from the changed class count."""
    module = types.ModuleType(f"{package}.{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # for annotations
    try:
        exec(compile(source, str(path), "exec"), vars(module))
        kinds = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Algorithm) and c.name]
        kinds = [c for c in kinds if cls in (b.__name__ for b in c.__mro__) and c.__module__ == module.__name__]
        alive = not any(kit._failure(name, kind) for kind in kinds for name in CHECKS)
        made = [kind() for kind in kinds]
        made += [k.model_validate(other.model_dump()) for other in others for k in kinds if k.name == other.name]
        pinned = alive and all(_same(kit.pin(a), pins[kit._label(a)]) for a in made)
    except Exception:  # a mutant that cannot even run is dead
        return False, False
    return alive, pinned


def _numbers(cls: type[Algorithm]) -> dict[str, Any]:
    """The defaults of its settings that are numbers."""
    return {name: f.default for name, f in cls.model_fields.items() if isinstance(f.default, int | float)}


def _same(a: dict[str, float], b: dict[str, float]) -> bool:
    return a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-9 * max(1.0, abs(b[k])) for k in a)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    counts, survivors = {"mutants": 0, "killed_by_properties": 0, "killed_with_pins": 0}, []
    for package, folder in PLUGINS.items():
        others = list(runpy.run_path(str(ROOT / "plugins" / folder / "tests/test_conformance.py"))["OTHERS"])
        pins = json.loads((ROOT / "plugins" / folder / "tests/pins.json").read_text("utf-8"))
        for path in sorted((ROOT / "plugins" / folder / "src" / package).glob("*.py")):
            original = sys.modules.get(f"{package}.{path.stem}")
            if path.stem in ("__init__", "base"):
                continue
            module = __import__(f"{package}.{path.stem}", fromlist=["x"]) if original is None else original
            kinds = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, Algorithm)}
            defaults = {n: _numbers(c) for n, c in kinds.items()}
            for name, cls, source in mutants(path.read_text("utf-8"), defaults):
                kit._defaults.cache_clear()
                alive, pinned = survives(source, package, path, pins, cls, others)
                counts["mutants"] += 1
                counts["killed_by_properties"] += not alive
                counts["killed_with_pins"] += not pinned
                if alive:
                    survivors.append({"mutant": f"{path.stem}.{name}", "pins_kill_it": not pinned})
            sys.modules[f"{package}.{path.stem}"] = module
            print(path.stem, counts, flush=True)
    out.write_text(json.dumps({**counts, "survivors": survivors}, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
