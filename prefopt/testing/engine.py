"""One step of an algorithm through the engine, with a model of two layers: its metrics and its gradient.

The reference is another model than the policy, so that no term of a loss is 0. Results are kept: properties compare
many ways to take the step with the same plain one.
"""

from __future__ import annotations

import atexit
import base64
import importlib.util
import inspect
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor

from prefopt.components import Algorithm
from prefopt.data.assemble import Assembled
from prefopt.engine.backward import backward
from prefopt.engine.folder import RunFolder
from prefopt.engine.layout import PLAIN, Paths
from prefopt.engine.loop import Loop
from prefopt.engine.ranks import Ranks
from prefopt.errors import PrefoptError
from prefopt.plugins import Plugins, load
from prefopt.session import Session
from prefopt.testing.rollouts import rollouts
from prefopt.testing.tiny import build_tiny, tiny_config


@dataclass(frozen=True)
class Trial:
    """The metrics of a first step, the gradient of every parameter, one after the other, and whether the method drew
    random numbers for its rows."""

    metrics: dict[str, float]
    flat: Tensor
    drew: bool = False


class Unused(LookupError):
    """The method uses none of the rows."""


@dataclass(frozen=True)
class Rows:
    """What a step is taken on: how many rows, turned round or not, each cut short or not, and whether the reference is
    the policy."""

    count: int = 5
    turned: bool = False
    cut: bool = False
    at_reference: bool = False


_kept: dict[tuple[object, ...], Trial] = {}
_latest: dict[tuple[object, ...], Ready] = {}
USUAL = Rows()
SHORT = 5
"""Tokens that are left of rows cut short."""
PATIENCE = 120.0
"""Seconds that two processes have for a step, the first time for their imports as well."""


def trial(algorithm: Algorithm, ranks: int = 1, rows: Rows = USUAL, **way: Any) -> Trial:
    """The first step on a few rows, on the fast path and in one microbatch unless `way` says otherwise: `forward`,
    `token_budget` and `precision`, as in the section `optim`. `ranks` 2 takes it, on the usual rows, on two
    processes."""
    key = (*_key(algorithm), ranks, rows, json.dumps(way, sort_keys=True))
    if key not in _kept:
        _kept[key] = first_step(algorithm, way, rows) if ranks == 1 else _pair().step(algorithm, way)
    return _kept[key]


def _key(algorithm: Algorithm) -> tuple[object, ...]:
    return type(algorithm), algorithm.model_dump_json()


def largest_gap(one: Trial, other: Trial) -> float:
    """The largest difference of two gradients, as a share of the largest element."""
    return float((one.flat - other.flat).abs().max() / one.flat.abs().max().clamp(min=1e-12))


def first_step(algorithm: Algorithm, way: dict[str, Any], rows: Rows = USUAL, home: Path | None = None) -> Trial:
    """The step in this process, or in this one of several. Raises `PrefoptError` where the engine does, `Unused` where
    there is none."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        return _step(_ready(algorithm, _home() if home is None else home, rows), way)
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Ready:
    """A run about to take its first step, and how it would take it."""

    loop: Loop
    built: Assembled
    paths: Paths
    budget: int


def _step(ready: Ready, way: dict[str, Any]) -> Trial:
    loop = ready.loop
    for scorer in (loop.scorer, *loop.scorer.beside):
        scorer.paths = PLAIN if way.get("forward") == "plain" else ready.paths
    loop.forwarder.budget = way.get("token_budget", ready.budget)
    loop.forwarder.dtype = way.get("precision", "float32")
    loop.optimizer.clear()
    context, drawn = loop.context(0, {}), []

    def make(purpose: str) -> torch.Generator:
        drawn.append(purpose)
        return context.make_generator(purpose)

    built, recorded = loop.prepared(ready.built, replace(context, make_generator=make))
    metrics = backward(loop.algorithm, loop.forwarder, built)
    parameters = dict(loop.scorer.named_parameters())
    slopes = [x.grad if x.grad is not None else torch.zeros_like(x) for _, x in sorted(parameters.items())]
    return Trial(recorded | metrics, torch.cat([x.detach().flatten() for x in slopes]), bool(drawn))


def _ready(algorithm: Algorithm, home: Path, rows: Rows) -> Ready:
    """The run, made once for all ways of one algorithm with the same rows."""
    key = (*_key(algorithm), rows)
    if key not in _latest:
        _latest.clear()
        _latest[key] = _assembled(algorithm, home, rows)
    return _latest[key]


def _assembled(algorithm: Algorithm, home: Path, rows: Rows) -> Ready:
    run = Path(tempfile.mkdtemp(dir=home)) / "run"
    sections: dict[str, Any] = {"optim": {"batch_size": rows.count}, "run": {"steps": 1}}
    if algorithm.needs().reference:
        sections["reference"] = {"path": str(home / ("policy" if rows.at_reference else "reference"))}
    if rows.cut:
        sections["data"] = {"max_length": SHORT, "overflow": "truncate"}
    config = tiny_config(home / "policy", run, sections, installed(), own=algorithm)
    run.mkdir()
    loop, _ = Session(config, installed(), Ranks("cpu"), RunFolder(run), lambda message: None).assemble()
    draws = algorithm.needs().draws
    given = [*(rollouts(draws, rows.count, rows.cut) if draws else loop.order.step(0))]
    given = given[::-1] if rows.turned else given
    built = (loop.assembler.of if draws else loop.assembler)(given)
    if built is None:
        raise Unused(f"`{algorithm.name}` uses none of {rows}")
    return Ready(loop, built, loop.scorer.paths, loop.forwarder.budget)


@cache
def installed() -> Plugins:
    """All installed plugins, loaded once."""
    return load()


@cache
def _home() -> Path:
    """A folder with two models, gone with the process."""
    home = Path(tempfile.mkdtemp(prefix="prefopt-testing-"))
    atexit.register(rmtree, home, ignore_errors=True)
    build_tiny(home / "policy", seed=0)
    build_tiny(home / "reference", seed=1)
    return home


# --- two processes ---------------------------------------------------------------------------------------------------


class Pair:
    """Two processes over gloo that take steps when asked; one pair serves every test of a process."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "prefopt.testing.engine", str(_home())]
        self.processes = [
            subprocess.Popen(
                command,
                env={**kept, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        atexit.register(self.close)

    def step(self, algorithm: Algorithm, optim: dict[str, Any]) -> Trial:
        """The step on both. Raises `PrefoptError` with what either says of its failure."""
        cls = type(algorithm)
        job = {
            "class": [cls.__module__, cls.__qualname__, inspect.getfile(cls)],
            "settings": algorithm.model_dump_json(),
            "optim": optim,
        }
        try:
            for process in self.processes:
                assert process.stdin is not None
                print(json.dumps(job), file=process.stdin, flush=True)
            answers = self._answers(time.monotonic() + PATIENCE)
        except BaseException:
            self.give_up()
            raise
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            self.give_up()  # one may wait for the other still
            raise PrefoptError(f"on two processes: {errors[0]}")
        flat = torch.frombuffer(bytearray(base64.b64decode(answers[0]["flat"])), dtype=torch.float32)
        return Trial(answers[0]["metrics"], flat)

    def _answers(self, deadline: float) -> list[dict[str, Any]]:
        """One of each process, by rank; or the first that is an error, for the other process may wait for this one."""
        outs = [process.stdout for process in self.processes if process.stdout is not None]
        found: dict[int, dict[str, Any]] = {}
        while len(found) < len(outs):
            waiting = [out for rank, out in enumerate(outs) if rank not in found]
            ready, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return [{"error": f"no answer in {PATIENCE:.0f} seconds"}]
            for out in ready:
                answer = json.loads(out.readline() or '{"error": "the process ended"}')
                if "error" in answer:
                    return [answer]
                found[outs.index(out)] = answer
        return [found[rank] for rank in range(len(outs))]

    def give_up(self) -> None:
        """Ends both; the next step begins with two others."""
        self.close()
        _pair.cache_clear()

    def close(self) -> None:
        """Ends both."""
        for process in self.processes:
            process.kill()
            process.wait()


@cache
def _pair() -> Pair:
    return Pair()


def _found(module: str, name: str, file: str) -> Any:
    """A class by its module, or where that cannot be imported, as of a test, by its file."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None, file
        assert spec.loader is not None, file
        found = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _answer(job: dict[str, Any], home: Path) -> dict[str, Any]:
    try:
        cls = _found(*job["class"])
        found = first_step(cls.model_validate_json(job["settings"], strict=True), job["optim"], home=home)
    except Exception as error:  # whatever it is, the other side has to hear of it
        return {"error": f"{type(error).__name__}: {error}"}
    return {"metrics": found.metrics, "flat": base64.b64encode(found.flat.numpy().tobytes()).decode()}


def main() -> None:
    """Answers each line of the standard input with one of the standard output; what plugins print goes elsewhere."""
    home = Path(sys.argv[1])
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            out.write(json.dumps(_answer(json.loads(line), home)) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
