"""From a suite to the runs and measurements it needs. Pure: nothing is trained and no file is written here.

Every run is known by its content: the hash of its configuration, of the runs it builds on, and of what else it depends
on: code, versions, data files, models. Equal runs are trained once; a change in any of these makes another run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from prefopt.bench.content import Find, dependencies, key_of, plain
from prefopt.config import Document, RunConfig, SuiteConfig, run_from
from prefopt.config.yaml import Keys
from prefopt.errors import ConfigError

STAGE = "stage:"
EXTRAS = ("label", "stage", "best_of")
"""Keys of a method that are not sections of a run."""


@dataclass(frozen=True)
class Job:
    """A training run: its configuration and the keys of the runs it builds on."""

    key: str
    title: str
    config: RunConfig
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One method x seed x setting: the run to measure, and what to measure it against."""

    label: str
    algorithm: str
    seed: int
    settings: Mapping[str, Any]
    job: str
    baseline: str
    best_of: int | None = None


@dataclass
class Plan:
    """The runs of a suite by key, in an order in which each comes after those it needs, and its cells."""

    jobs: dict[str, Job] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def chain(self, key: str) -> list[str]:
        """The run and all it builds on."""
        return list(dict.fromkeys([*(k for need in self.jobs[key].needs for k in self.chain(need)), key]))

    def counted(self, cell: Cell) -> list[str]:
        """The runs whose cost is the cell's: all but what the baseline cost."""
        free = set(self.chain(cell.baseline))
        return [key for key in self.chain(cell.job) if key not in free]


def make_plan(suite: SuiteConfig, document: Document, out: Path, find: Find) -> Plan:
    """The plan of a suite whose runs are kept under `out`. Raises `ConfigError` for anything wrong in any run."""
    if suite.baseline not in suite.stages:
        raise ConfigError(f"the baseline `{suite.baseline}` is not a stage", where=document.where(("baseline",)))
    builder = _Builder(document, out, find)
    for seed in suite.seeds:
        stages: dict[str, Job] = {}
        for name in suite.stages:
            stages[name] = builder.job(f"{name}, seed {seed}", document.at("stages", name), seed, stages)
        for method, settings in _variants(document, len(suite.methods)):
            builder.cell(method, settings, seed, stages, suite.baseline)
    return builder.plan


def _variants(document: Document, methods: int) -> Iterator[tuple[Document, dict[str, Any]]]:
    """Each method in each combination of the axes, as a document, with the settings that make the combination."""
    axes = document.at("axes").data or {}
    for i in range(methods):
        method = document.at("methods", i)
        for values in product(*axes.values()):
            settings = dict(zip(axes, values, strict=True))
            yield method, settings if "stage" not in method.data else {}


@dataclass
class _Builder:
    document: Document
    out: Path
    find: Find
    plan: Plan = field(default_factory=Plan)

    def cell(
        self, method: Document, settings: dict[str, Any], seed: int, stages: Mapping[str, Job], baseline: str
    ) -> None:
        """Adds a cell, and its run unless it measures a stage as it is."""
        extras = {key: method.data.get(key) for key in EXTRAS}
        if extras["stage"] is not None:
            job = self._stage(str(extras["stage"]), stages, method.where(("stage",)))
        else:
            sections = Document({k: v for k, v in method.data.items() if k not in EXTRAS}, method.places)
            run = self.document.at("base").merged(sections)
            for path, value in settings.items():
                where = self.document.where(("axes", path))
                run.put(tuple(path.split(".")), Document(value, {(): where}))
            title = str(extras["label"] or run.data.get("algorithm", {}).get("name", "?"))
            job = self.job(f"{title}, seed {seed}", run, seed, stages)
        best_of = extras["best_of"]
        if best_of is not None and not (isinstance(best_of, int) and best_of >= 2):
            raise ConfigError("`best_of` is a number of replies, at least 2", where=method.where(("best_of",)))
        if job.config.algorithm.trains_reward != (best_of is not None):
            raise ConfigError("a method needs `best_of` exactly when it trains a reward model", where=method.where(()))
        label = str(extras["label"] or job.config.algorithm.name)
        name = job.config.algorithm.name
        new = Cell(label, name, seed, settings, job.key, stages[baseline].key, best_of)
        if new not in self.plan.cells:
            self.plan.cells.append(new)

    def job(self, title: str, run: Document, seed: int, stages: Mapping[str, Job]) -> Job:
        """Adds a run. References to stages become the folders of their models."""
        for key in ("prefopt", "run.seed", "run.dir"):
            if run.at(*key.split(".")).data not in ({}, None):
                raise ConfigError(f"`{key}` is set by the suite", where=run.where(tuple(key.split("."))))
        run = run.merged(Document({"prefopt": 1, "run": {"dir": str(self.out / "run"), "seed": seed}}))
        config = run_from(run, self.find)
        data = plain(config)
        needs = tuple(
            self._stage(name, stages, run.where(_path_to(f"{STAGE}{name}", run.data))).key for name in _stages_in(data)
        )
        named = {f"{STAGE}{name}": key for name, key in zip(_stages_in(data), needs, strict=True)}
        del data["run"]["dir"]
        key = key_of({"config": _replaced(data, named), "depends": dependencies(config, self.find)})
        data = _replaced(data, {old: str(model_folder(self.out, k)) for old, k in named.items()})
        data["run"]["dir"] = str(run_folder(self.out, key))
        job = Job(key, title, run_from(Document(data), self.find), tuple(dict.fromkeys(needs)))
        return self.plan.jobs.setdefault(key, job)

    @staticmethod
    def _stage(name: str, stages: Mapping[str, Job], where: str) -> Job:
        if name not in stages:
            known = ", ".join(stages) or "none yet"
            raise ConfigError(f"there is no stage `{name}` before this run", where=where, fix=f"Stages: {known}.")
        return stages[name]


def run_folder(out: Path, key: str) -> Path:
    """Where a run is kept."""
    return out / "store" / key


def model_folder(out: Path, key: str) -> Path:
    """Where its model is."""
    return run_folder(out, key) / "model"


def _stages_in(node: Any) -> list[str]:
    """Names of the stages that a configuration refers to, in order, once each."""
    if isinstance(node, str):
        return [node.removeprefix(STAGE)] if node.startswith(STAGE) else []
    parts: Sequence[Any] = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    return list(dict.fromkeys(name for part in parts for name in _stages_in(part)))


def _path_to(text: str, node: Any) -> Keys:
    """Where `text` stands in plain data."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if value == text:
            return (key,)
        if path := _path_to(text, value):
            return (key, *path)
    return ()


def _replaced(node: Any, names: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(item, names) for item in node]
    return names.get(node, node) if isinstance(node, str) else node
