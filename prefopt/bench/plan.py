"""From a suite to the runs and measurements it needs. Pure: nothing is trained and no file is written here.

Every run is known by its content: the hash of its configuration, of the runs it builds on, and of what else it depends
on: code, versions, data files, models. Equal runs are trained once; a change in any of these makes another run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from prefopt.bench.content import Find, dependencies, key_of, plain
from prefopt.config import Document, RunConfig, SuiteConfig
from prefopt.config.stages import (
    STAGE,
    TRAIN,
    Config,
    check_references,
    kind_of,
    makes,
    product_of,
    replaced,
    stage_from,
)
from prefopt.errors import ConfigError
from prefopt.rows import Row

EXTRAS = ("label", "stage", "best_of")
"""Keys of a method that are not sections of a run."""
OWN = ("prefopt", "plugins", "run.seed", "run.dir")
"""Keys of a run that the suite sets."""
SHORT = ("algorithm", "sampler")
"""Sections that may be a name alone: `algorithm: dpo` is `algorithm: {name: dpo}`."""


@dataclass(frozen=True)
class Job:
    """A training run, or another stage: its configuration and the keys of those it builds on."""

    key: str
    title: str
    config: Config
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

    @property
    def row(self) -> tuple[str, Mapping[str, Any]]:
        """What a report tells it by: cells that differ in nothing but their seed make up one row."""
        return self.label, self.settings


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
    base = document.at("base")
    builder = _Builder(document, _sections(base, base.data), out, find)
    methods = [_Method.read(document.at("methods", i)) for i in range(len(suite.methods))]
    for seed in suite.seeds:
        stages: dict[str, Job] = {}
        for name in suite.stages:
            stages[name] = builder.job(f"{name}, seed {seed}", document.at("stages", name), seed, stages)
        _measurable(suite.baseline, stages, document.where(("baseline",)))
        for method in methods:
            for settings in _combinations(document) if method.stage is None else [{}]:
                builder.cell(method, settings, seed, stages, suite.baseline)
    return builder.plan


def _combinations(document: Document) -> Iterator[dict[str, Any]]:
    """Every combination of the axes."""
    axes = document.at("axes").data or {}
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


@dataclass(frozen=True)
class _Method:
    """A method as it is written: a stage to measure as it is, or the sections that make it differ from the base."""

    written: Document
    label: str | None
    stage: str | None
    best_of: int | None
    sections: Document

    @classmethod
    def read(cls, written: Document) -> _Method:
        """Raises `ConfigError` for anything that is not what it should be, or would do nothing."""
        label, stage, best_of = (written.data.get(key) for key in EXTRAS)
        for key, value in (("label", label), ("stage", stage)):
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"`{key}` must be text", where=written.where((key,)))
        if best_of is not None and (isinstance(best_of, bool) or not isinstance(best_of, int) or best_of < 2):
            raise ConfigError("`best_of` is a number of replies, at least 2", where=written.where(("best_of",)))
        others = [key for key in written.data if key not in EXTRAS]
        if stage is not None and others:
            what = f"`{others[0]}` does nothing beside `stage`: a stage is measured as it is"
            raise ConfigError(what, where=written.where((others[0],)))
        return cls(written, label, stage, best_of, _sections(written, others))


def _sections(written: Document, keys: Iterable[str]) -> Document:
    """The sections of a run, short forms written out. Raises `ConfigError` for one that is no mapping: what is merged
    with it would silently replace it."""
    out = Document({}, {(): written.where(())})
    for key in keys:
        part = written.at(key)
        if key in SHORT and isinstance(part.data, str):
            part = Document({"name": part.data}, {(): part.where(()), ("name",): part.where(())})
        elif key in RunConfig.model_fields and key not in OWN and not isinstance(part.data, dict | None):
            raise ConfigError(f"`{key}` is a section with keys of its own", where=part.where(()))
        out.put((key,), part)
    return out


@dataclass
class _Builder:
    document: Document
    base: Document
    out: Path
    find: Find
    plan: Plan = field(default_factory=Plan)

    def cell(
        self, method: _Method, settings: dict[str, Any], seed: int, stages: Mapping[str, Job], baseline: str
    ) -> None:
        """Adds a cell, and its run unless it measures a stage as it is."""
        where = method.written.where(())
        if method.stage is not None:
            job = _measurable(method.stage, stages, method.written.where(("stage",)))
        else:
            run = self._varied(self.base.merged(method.sections), settings)
            if kind_of(run) != TRAIN:
                raise ConfigError("a method trains: only stages have another `kind`", where=run.where(("kind",)))
            job = self.job(f"{method.label or _algorithm(run)}, seed {seed}", run, seed, stages)
        assert isinstance(job.config, RunConfig), "what makes rows is not measured"
        name = job.config.algorithm.name
        if job.config.algorithm.trains_reward != (method.best_of is not None):
            raise ConfigError("a method needs `best_of` exactly when it trains a reward model", where=where)
        new = Cell(method.label or name, name, seed, settings, job.key, stages[baseline].key, method.best_of)
        twin = next((c for c in self.plan.cells if c.row == new.row and c.seed == seed), None)
        if twin is None:
            self.plan.cells.append(new)
        elif twin != new:
            what = f"another method is called `{new.label}` too: one row would mix the results of both"
            raise ConfigError(what, where=method.written.where(("label",)), fix="Give each a `label` of its own.")

    def _varied(self, run: Document, settings: Mapping[str, Any]) -> Document:
        """A run with the settings of one combination of the axes."""
        for path, value in settings.items():
            where = self.document.where(("axes", path))
            keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
            try:
                run.put(keys, Document(deepcopy(value), {(): where}))
            except KeyError as error:
                what = f"`{path}` leads nowhere: {error.args[0]!r} is not in a section"
                raise ConfigError(what, where=where) from None
            run = _sections(run, run.data)
        return run

    def job(self, title: str, run: Document, seed: int, stages: Mapping[str, Job]) -> Job:
        """Adds a stage. References to others become what these make."""
        run = _sections(run, run.data)
        for key in OWN:
            if run.at(*key.split(".")).data not in ({}, None):
                raise ConfigError(f"`{key}` is set by the suite", where=run.where(tuple(key.split("."))))
        run = run.merged(Document({"prefopt": 1, "run": {"dir": str(self.out / "run"), "seed": seed}}))
        needs = {name: stages[name] for name in check_references(run, _made(stages))}
        config = stage_from(run, self.find)
        data = plain(config)
        del data["run"]["dir"]
        named = replaced(data, {f"{STAGE}{name}": job.key for name, job in needs.items()})
        key = key_of({"config": named, "depends": dependencies(config, self.find)})
        data = replaced(data, {f"{STAGE}{name}": product_of(job.config) for name, job in needs.items()})
        data["run"]["dir"] = str(run_folder(self.out, key))
        job = Job(key, title, stage_from(Document(data), self.find), tuple({j.key: None for j in needs.values()}))
        return self.plan.jobs.setdefault(key, job)


def _measurable(name: str, stages: Mapping[str, Job], where: str) -> Job:
    """The stage of this name. Raises `ConfigError` where it trains no model."""
    check_references(Document({"stage": f"{STAGE}{name}"}, {("stage",): where}), _made(stages))
    return stages[name]


def _made(stages: Mapping[str, Job]) -> dict[str, type[Row] | None]:
    """The rows that stages make, None for those that train."""
    return {name: makes(job.config) for name, job in stages.items()}


def _algorithm(run: Document) -> str:
    name = run.at("algorithm", "name").data
    return name if isinstance(name, str) else "?"


def run_folder(out: Path, key: str) -> Path:
    """Where a run is kept."""
    return out / "store" / key


def model_folder(out: Path, key: str) -> Path:
    """Where its model is."""
    return run_folder(out, key) / "model"
