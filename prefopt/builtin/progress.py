"""Shows how a run gets on: one live line in a terminal, plain lines elsewhere. An observer like any plugin's."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefopt.api import RunInfo, hookimpl

LINES = 20
SHOWN = ("loss/total", "reward/accuracy", "kl/sequence")


@dataclass
class _Display:
    """The run being shown. `live` is a rich progress bar, None when the output is not a terminal."""

    live: Any = None
    task: Any = None
    began: float = field(default_factory=time.monotonic)


_displays: dict[str, _Display] = {}


@hookimpl
def prefopt_run_started(run: RunInfo) -> None:
    display = _displays[str(run.folder)] = _Display()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        display.live = Progress(*columns, TextColumn("{task.fields[shown]}"), console=Console(stderr=True))
        display.task = display.live.add_task(run.algorithm, total=run.last_step, completed=run.first_step, shown="")
        display.live.start()
    else:
        _say(f"{run.algorithm}: steps {run.first_step} to {run.last_step} in {run.folder}")


@hookimpl
def prefopt_step_finished(run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
    display = _displays.get(str(run.folder))
    if display is None:
        return
    evaluation = any(name.startswith("eval/") for name in metrics)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.removeprefix("eval/") in SHOWN)
    if display.live is not None:
        display.live.update(display.task, completed=step, shown=shown)
    elif evaluation or step % max(1, run.last_step // LINES) == 0 or step == run.last_step:
        _say(f"step {step}/{run.last_step}  {shown}  {_remaining(run, step, display)}")


@hookimpl
def prefopt_run_finished(run: RunInfo, outcome: str) -> None:
    display = _displays.pop(str(run.folder), None)
    if display is not None and display.live is not None:
        display.live.stop()
    _say(f"{run.algorithm}: {outcome}")


def _remaining(run: RunInfo, step: int, display: _Display) -> str:
    each = (time.monotonic() - display.began) / max(step - run.first_step, 1)
    return f"{each * (run.last_step - step):.0f} s left"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
