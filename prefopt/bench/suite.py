"""Runs a suite: trains and measures what is missing, writes the report. Finished work is never repeated."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from prefopt.bench.cells import warm, work
from prefopt.bench.content import Find, dependencies, key_of, plain
from prefopt.bench.plan import Cell, Job, Plan, make_plan, model_folder, run_folder
from prefopt.bench.report import CellResult, Failure, Report, build_report, commit_of, table, to_html
from prefopt.config import RunConfig, SuiteConfig, allowed_plugins, load_suite
from prefopt.config.stages import product_of
from prefopt.engine.folder import write_text
from prefopt.errors import ResourceError, redact
from prefopt.plugins import load
from prefopt.preflight import check, promise
from prefopt.rows import Row
from prefopt.verdicts import added

MEASURED = ("tasks", "sampler", "prompts", "held_out")
"""The keys of a suite that say how to measure."""


def run_suite(path: Path, overrides: Sequence[str] = (), out: Path | None = None) -> Iterator[str]:
    """Runs the suite in a file; yields lines of progress, then the table and where the report is.

    Raises `ConfigError` before anything runs when any run of the suite is wrong, `ResourceError` at the end when some
    cells failed.
    """
    began = time.monotonic()
    allow = allowed_plugins(path, overrides)
    plugins = load(allow)
    suite, document = load_suite(path, plugins.find, overrides)
    folder = (out or Path("runs") / f"bench-{suite.name}").resolve()
    plan = make_plan(suite, document, folder, plugins.find)
    promised: dict[str, type[Row] | None] = {}
    for job in plan.jobs.values():
        check(job.config, plugins.registry, promised)
        promised[product_of(job.config)] = promise(job.config, promised)
    _make_folders(folder)
    execution = Execution(suite, plan, folder, list(allow) if allow is not None else None, plugins.find)
    yield from execution.run()
    report = build_report(suite, execution.results, execution.failures, execution.commit)
    write_report(report, folder)
    yield from ("", *table(report), "")
    yield f"report: {folder / 'report.html'} (and report.json) after {time.monotonic() - began:.0f} s"
    if execution.failures:
        raise ResourceError(*(f"{f.title}: {f.problem}" for f in execution.failures), fix="The other cells are kept.")


def write_report(report: Report, folder: Path) -> None:
    """Writes `report.json` and `report.html`."""
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.html", to_html(report))


def _make_folders(folder: Path) -> None:
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        (folder / "store").mkdir(exist_ok=True)
    except OSError as error:
        raise ResourceError(f"the suite's folder cannot be made: {error.strerror}", where=str(folder)) from None


@dataclass
class Execution:
    """The work of a suite, spread over processes; a task starts when those it needs are done."""

    suite: SuiteConfig
    plan: Plan
    out: Path
    allow: list[str] | None
    find: Find
    results: list[CellResult] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    commit: str = field(default_factory=commit_of)

    def run(self) -> Iterator[str]:
        """Does everything that is not done yet; yields a line for each thing done."""
        tasks = self._tasks()
        todo = {key: task for key, task in tasks.items() if not self._done(key)}
        kept = len(tasks) - len(todo)
        if kept:
            yield f"{kept} of {len(tasks)} runs and measurements are kept from before"
        if todo:
            yield from self._work(tasks, todo)
        self._collect()

    def _tasks(self) -> dict[str, Task]:
        """Every training run, then every measurement, each with the tasks it waits for."""
        runs = {
            key: Task(f"{_kind(job)} {job.title}", {"stage": plain(job.config)}, job.needs)
            for key, job in self.plan.jobs.items()
        }
        measures = {self.cell_key(cell): self._measurement(cell) for cell in self.plan.cells}
        return runs | measures

    @cached_property
    def _measured(self) -> dict[str, Any]:
        """How every cell is measured: as the suite says, all on the device of the base run."""
        run = self.suite.base.get("run") or {}
        own = {key: value for key, value in plain(self.suite).items() if key in MEASURED}
        return {**own, "device": run.get("device", "auto")}

    @cached_property
    def _depends(self) -> dict[str, Any]:
        """What measurements depend on beside their configuration and the models they measure."""
        return dependencies([getattr(self.suite, key) for key in MEASURED], self.find)

    def _measurement(self, cell: Cell) -> Task:
        model = str(model_folder(self.out, cell.job))
        rewarding = cell.best_of is not None
        request = {
            **self._measured,
            "seed": cell.seed,
            "baseline": str(model_folder(self.out, cell.baseline)),
            "policy": None if rewarding else model,
            "reward": model if rewarding else None,
            "best_of": cell.best_of,
        }
        return Task(f"measure {cell.label}, seed {cell.seed}", {"measure": request}, (cell.job, cell.baseline))

    def cell_key(self, cell: Cell) -> str:
        """The content address of a measurement: what is measured, how, on which runs, and what else that depends on."""
        runs = [cell.job, cell.baseline, cell.best_of, cell.seed, cell.label, dict(cell.settings)]
        return key_of([self._measured, self._depends, runs])

    def _done(self, key: str) -> bool:
        return (run_folder(self.out, key) / "result.json").exists() or self._cell_file(key).exists()

    def _cell_file(self, key: str) -> Path:
        return self.out / "cells" / f"{key}.json"

    # --- working -----------------------------------------------------------------------------------------------------

    def _work(self, tasks: Mapping[str, Task], todo: dict[str, Task]) -> Iterator[str]:
        workers = min(self.suite.workers or os.cpu_count() or 1, len(todo))
        finished = {key for key in tasks if key not in todo}
        running: dict[Future[str], str] = {}
        began, total = time.monotonic(), len(todo)
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ.update({k: os.environ.get(k, v) for k, v in environment.items()})
        with ProcessPoolExecutor(workers, get_context("spawn"), warm, (self.allow,)) as pool:
            while todo or running:
                running |= self._begun(pool, todo, finished)
                if not running:
                    break  # what is left needs something that failed, or processes that are gone
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(future)
                    if self._settle(key, tasks[key], future):
                        finished.add(key)
                    done = total - len(todo) - len(running)
                    left = (time.monotonic() - began) / done * (total - done)
                    yield f"[{done:{len(str(total))}}/{total}] {tasks[key].title}  ({left:.0f} s left)"
        for task in todo.values():
            missing = [tasks[need].title for need in task.needs if need not in finished]
            why = f"needs `{missing[0]}`, which failed" if missing else "not begun: a worker process died before"
            self.failures.append(Failure(title=task.title, problem=why))

    def _begun(self, pool: ProcessPoolExecutor, todo: dict[str, Task], finished: set[str]) -> dict[Future[str], str]:
        """Hands the tasks that need nothing more to the processes, as long as there are any."""
        begun: dict[Future[str], str] = {}
        for key in [k for k, task in todo.items() if set(task.needs) <= finished]:
            try:
                begun[pool.submit(work, json.dumps(todo[key].request))] = key
            except BrokenProcessPool:
                break
            del todo[key]
        return begun

    def _settle(self, key: str, task: Task, future: Future[str]) -> bool:
        """Keeps the answer of a task; False when it failed."""
        try:
            answer = json.loads(future.result())
        except BrokenProcessPool:
            answer = {"error": ["a worker process died, this one or one beside it. Out of memory? Run again."]}
        if "error" in answer:
            details = answer.get("traceback", "")
            self.failures += [Failure(title=task.title, problem=p, traceback=details) for p in answer["error"]]
            return False
        if "measure" in task.request:
            answer["commit"] = self.commit
            write_text(self._cell_file(key), json.dumps(redact(answer), indent=1, ensure_ascii=False) + "\n")
        return True

    # --- collecting --------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        for cell in self.plan.cells:
            path = self._cell_file(self.cell_key(cell))
            if path.exists():
                self.results.append(self._result(cell, json.loads(path.read_text("utf-8"))))

    def _result(self, cell: Cell, answer: Mapping[str, Any]) -> CellResult:
        counted = [run_folder(self.out, key) for key in self.plan.counted(cell)]
        results = [json.loads((folder / "result.json").read_text("utf-8")) for folder in counted]
        budgets = [result["budget"] for result in results]
        used = [line for folder in counted for line in _lines(folder / "timings.jsonl") if "total_seconds" in line]
        answering = answer["answering"]
        info = json.loads((run_folder(self.out, cell.job) / "run.json").read_text("utf-8"))
        return CellResult.model_validate(
            {
                "algorithm": cell.algorithm,
                "label": cell.label,
                "seed": cell.seed,
                "settings": dict(cell.settings),
                "metrics": answer["metrics"],
                "budget": {
                    "tokens_forward": sum(b["forward"] for b in budgets) + answering["scored"],
                    "tokens_backward": sum(b["backward"] for b in budgets),
                    "tokens_sampled": sum(b["sampled"] for b in budgets) + answering["sampled"],
                    "seconds": sum(line["total_seconds"] for line in used) + answering["seconds"],
                    "peak_memory_bytes": max(line["peak_memory_bytes"] for line in [*used, answering]),
                    "usage": added([result.get("usage", {}) for result in results]),
                },
                "versions": {**info["versions"], info["algorithm"]["distribution"]: info["algorithm"]["version"]},
                "commit": answer["commit"],
                "run": cell.job,
                "samples": answer["samples"],
            }
        )


@dataclass(frozen=True)
class Task:
    """A piece of work for one process, and the keys of those it waits for."""

    title: str
    request: Mapping[str, Any]
    needs: tuple[str, ...]


def _kind(job: Job) -> str:
    return "train" if isinstance(job.config, RunConfig) else job.config.kind


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
