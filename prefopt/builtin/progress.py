"""Shows how a run gets on: one live line in a terminal, plain lines elsewhere; of a run that samples, also some of the
last replies with their rewards. An observer like any plugin's."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

from prefopt.api import Rollout, RunInfo, hookimpl, show_text

LINES = 20
SHOWN = ("loss/total", "reward/accuracy", "reward/mean", "kl/sequence")
REPLIES = 4
WIDTH = 70


@dataclass
class _Display:
    """The run being shown. `live` is what rich keeps drawing, None when the output is not a terminal; `bar` is in it,
    and beneath it the last replies."""

    live: Any = None
    bar: Any = None
    replies: List[tuple[str, str, str]] = ()
    task: Any = None
    began: float = field(default_factory=time.monotonic)


_displays: dict[str, _Display] = {}


@hookimpl
def prefopt_run_started(run: RunInfo) -> None:
    display = _displays[str(run.folder)] = _Display()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        display.bar = Progress(*columns, TextColumn("{task.fields[shown]}"))
        display.task = display.bar.add_task(run.algorithm, total=run.last_step, completed=run.first_step, shown="")
        display.live = Live(display.bar, console=Console(stderr=True))
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
        display.bar.update(display.task, completed=step, shown=shown)
    elif evaluation or step % max(1, run.last_step // LINES) == 0 or step == run.last_step:
        _say(f"step {step}/{run.last_step}  {shown}  {_remaining(run, step, display)}")
        for reward, prompt, reply in display.replies[:1]:
            _say(f"    {reward}  {prompt} -> {reply}")


@hookimpl
def prefopt_rollouts_drawn(run: RunInfo, step: int, rollouts: List[Rollout]) -> None:
    display = _displays.get(str(run.folder))
    if display is None:
        return
    firsts = [(group, group.completions[0]) for group in rollouts[:REPLIES]]
    display.replies = [(f"{c.score:.3g}", _short(show_text(g.prompt)), _short(c.text)) for g, c in firsts]
    if display.live is not None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("reward", "prompt", "reply", title=f"step {step}", title_justify="left")
        for row in display.replies:
            table.add_row(*map(Text, row))
        display.live.update(Group(display.bar, table))


@hookimpl
def prefopt_run_finished(run: RunInfo, outcome: str) -> None:
    display = _displays.pop(str(run.folder), None)
    if display is not None and display.live is not None:
        display.live.stop()
    _say(f"{run.algorithm}: {outcome}")


def _short(text: str) -> str:
    """One line of printable letters."""
    line = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def _remaining(run: RunInfo, step: int, display: _Display) -> str:
    each = (time.monotonic() - display.began) / max(step - run.first_step, 1)
    return f"{each * (run.last_step - step):.0f} s left"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
