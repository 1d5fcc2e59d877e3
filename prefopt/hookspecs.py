"""Every hook, on one screen. A plugin implements some of them and points one entry point in group `prefopt` at itself.

    # my_plugin/__init__.py
    from prefopt.api import hookimpl
    from my_plugin.method import MyMethod

    @hookimpl
    def prefopt_algorithms():
        return [MyMethod]

The first eight are called once, at the latest when a component of their kind is looked up; they return component
classes and must not load torch or touch files. What they import inside costs nothing until then. The last four observe
a run: whatever they raise is reported once and the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pluggy

from prefopt.components import Algorithm, DataSource, Judge, RewardSource, Sampler, Task, World
from prefopt.revising import Reviser
from prefopt.rows import Rollout

hookspec = pluggy.HookspecMarker("prefopt")
hookimpl = pluggy.HookimplMarker("prefopt")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What an observer is told about a run: its folder, algorithm, first and last step."""

    folder: Path
    algorithm: str
    first_step: int
    last_step: int


@hookspec
def prefopt_algorithms() -> Sequence[type[Algorithm]]:  # type: ignore[empty-body]
    """Methods, selected by `algorithm: {name: ...}`."""


@hookspec
def prefopt_rewards() -> Sequence[type[RewardSource]]:  # type: ignore[empty-body]
    """Reward sources, used by tasks and by best-of-n."""


@hookspec
def prefopt_judges() -> Sequence[type[Judge]]:  # type: ignore[empty-body]
    """Judges of pairs."""


@hookspec
def prefopt_revisers() -> Sequence[type[Reviser]]:  # type: ignore[empty-body]
    """Revisers of replies, selected by `reviser: {name: ...}` in a stage that revises."""


@hookspec
def prefopt_datasets() -> Sequence[type[DataSource]]:  # type: ignore[empty-body]
    """Data sources, selected by `data: {source: ...}`."""


@hookspec
def prefopt_samplers() -> Sequence[type[Sampler]]:  # type: ignore[empty-body]
    """Samplers, selected by `sampler: {name: ...}`."""


@hookspec
def prefopt_tasks() -> Sequence[type[Task]]:  # type: ignore[empty-body]
    """Measurements, selected by `eval: {tasks: [{name: ...}]}` and by suites."""


@hookspec
def prefopt_worlds() -> Sequence[type[World]]:  # type: ignore[empty-body]
    """Worlds, selected by `model: {path: "world:NAME"}`."""


@hookspec
def prefopt_run_started(run: RunInfo) -> None:
    """A run begins or resumes. Called on the main rank only, like the two below."""


@hookspec
def prefopt_step_finished(run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
    """A step, or an evaluation (its metrics start with `eval/`), has been recorded. Must not change the metrics."""


@hookspec
def prefopt_rollouts_drawn(run: RunInfo, step: int, rollouts: Sequence[Rollout]) -> None:
    """The replies of a step have been drawn and scored, before anything is learned from them. Called on the main rank,
    also when a resumed run reads them from its journal. Must not change them."""


@hookspec
def prefopt_run_finished(run: RunInfo, outcome: str) -> None:
    """A run ended: `finished`, `stopped` (early), `preempted` or `failed`."""
