"""The report of a suite: typed and versioned as JSON, readable as one HTML file without scripts, and as a table."""

from __future__ import annotations

import subprocess
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict

import prefopt
from prefopt.bench.content import plain
from prefopt.bench.plots import Point, forest, scatter
from prefopt.config import SuiteConfig, dump
from prefopt.errors import redact
from prefopt.stats import FEWEST_SEEDS, Interval, t_interval

HEADLINE = ("gold_reward", "win_rate", "kl_sequence", "length")
TITLES = {"gold_reward": "gold reward", "win_rate": "win rate", "kl_sequence": "KL (nats)", "length": "length"}


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Typed):
    """What a cell cost beyond its baseline. Seconds and memory vary between runs; tokens do not."""

    tokens_forward: int
    tokens_backward: int
    tokens_sampled: int
    seconds: float
    peak_memory_bytes: int
    usage: dict[str, float] = {}
    """What judges and revisers in its stages say they took: calls, tokens, cost. Tokens of a model that ran here are
    among those above too."""

    def flat(self) -> dict[str, float]:
        """Every number by its name."""
        own: dict[str, float] = self.model_dump(exclude={"usage"})
        return {**own, **{f"usage/{name}": value for name, value in self.usage.items()}}


class Sample(_Typed):
    """A reply to a held-out prompt."""

    prompt: str
    reply: str
    reward: float | None = None


class CellResult(_Typed):
    """One method x seed x setting, measured."""

    algorithm: str
    label: str
    seed: int
    settings: dict[str, Any]
    metrics: dict[str, float]
    budget: Budget
    versions: dict[str, str]
    commit: str = ""
    run: str
    samples: list[Sample] = []


class Summary(_Typed):
    """A method in one setting, over seeds."""

    algorithm: str
    label: str
    settings: dict[str, Any]
    n: int
    metrics: dict[str, Interval]
    budget: dict[str, float]


class Failure(_Typed):
    """A run or measurement that failed, and why."""

    title: str
    problem: str
    traceback: str = ""
    """Where it happened, when it was nothing that prefopt foresees."""


class Report(_Typed):
    """A suite, measured. `version` changes when a field changes its meaning."""

    version: Literal[1] = 1
    suite: str
    commit: str
    seeds: list[int]
    configuration: dict[str, Any]
    summary: list[Summary]
    cells: list[CellResult]
    failures: list[Failure] = []

    def comparable(self) -> dict[str, Any]:
        """What two runs of the same suite must agree on, byte for byte: all but seconds, memory and what servers were
        asked, which caches spare."""
        vary = {"seconds", "peak_memory_bytes", "usage"}
        return self.model_dump(exclude={"cells": {"__all__": {"budget": vary}}, "summary": {"__all__": {"budget"}}})


def build_report(suite: SuiteConfig, cells: Sequence[CellResult], failures: Sequence[Failure], commit: str) -> Report:
    """Cells and their summary over seeds, without secrets; `commit` is that of the code that reports."""
    report = Report(
        suite=suite.name,
        commit=commit,
        seeds=list(suite.seeds),
        configuration=plain(suite),
        summary=[_summary(group) for group in _groups(cells)],
        cells=list(cells),
        failures=list(failures),
    )
    return Report.model_validate(redact(report.model_dump(mode="json")))


def short_commit() -> str:
    """The first seven letters of prefopt's commit, with the `+` of `commit_of`."""
    commit = commit_of()
    return commit[:7] + commit[40:]


def commit_of(file: Path = Path(prefopt.__file__)) -> str:
    """The git commit of a source file, `+` when a tracked file was changed since; empty when its repository does not
    track it, as when it is installed somewhere inside another project's checkout."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(file.parent), *arguments)
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        return found.stdout.strip() if found.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD") if git("ls-files", file.name) else ""
        return f"{head}+" if head and git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _groups(cells: Sequence[CellResult]) -> list[list[CellResult]]:
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(repr((cell.label, cell.settings)), []).append(cell)
    return list(groups.values())


def _summary(cells: Sequence[CellResult]) -> Summary:
    first = cells[0]
    names = dict.fromkeys(name for cell in cells for name in cell.metrics)
    budgets = [cell.budget.flat() for cell in cells]
    costs = dict.fromkeys(name for budget in budgets for name in budget)
    return Summary(
        algorithm=first.algorithm,
        label=first.label,
        settings=first.settings,
        n=len(cells),
        metrics={name: _interval(name, cells) for name in names},
        budget={name: sum(b.get(name, 0.0) for b in budgets) / len(budgets) for name in costs},
    )


def _interval(name: str, cells: Sequence[CellResult]) -> Interval:
    """A metric over the seeds that have it, with their number when it is not all of them."""
    values = [cell.metrics[name] for cell in cells if name in cell.metrics]
    interval = t_interval(values)
    return interval if len(values) == len(cells) else interval.model_copy(update={"n": len(values)})


# --- as a table ------------------------------------------------------------------------------------------------------


def headline(report: Report) -> dict[str, str]:
    """The metrics that come first, each with its title; where no row has one of them, all there are."""
    there = dict.fromkeys(name for summary in report.summary for name in summary.metrics)
    first = [name for name in HEADLINE if name in there] or list(there)
    return {name: TITLES.get(name, name.replace("_", " ")) for name in first}


def table(report: Report) -> list[str]:
    """The headline metrics with their intervals, aligned for a terminal."""
    names = headline(report)
    header = ["method", *names.values(), "tokens trained", "sampled", "seconds"]
    rows = [header, *(_row(summary, names, len(report.seeds)) for summary in report.summary)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:], "", *notes(report)]


def _row(summary: Summary, names: Iterable[str], seeds: int) -> list[str]:
    cells = [shown(summary.metrics.get(name)) for name in names]
    budget = summary.budget
    tokens = [f"{budget['tokens_backward']:,.0f}", f"{budget['tokens_sampled']:,.0f}"]
    fewer = f", {summary.n} of {seeds} seeds" if summary.n != seeds else ""
    return [name_of(summary) + fewer, *cells, *tokens, f"{budget['seconds']:.0f}"]


def name_of(summary: Summary | CellResult) -> str:
    """The label with the settings of the axes."""
    settings = ", ".join(f"{key}={value}" for key, value in summary.settings.items())
    return f"{summary.label} ({settings})" if settings else summary.label


def shown(interval: Interval | None) -> str:
    """A mean with its interval, and over how many seeds when a row has more.

    >>> shown(Interval(mean=1.5, low=1.2, high=1.8))
    '1.50 [1.20, 1.80]'
    >>> shown(Interval(mean=1.5, n=2))
    '1.50 (n=2)'
    """
    if interval is None:
        return "-"
    spread = "" if interval.low is None or interval.high is None else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{interval.mean:.2f}{spread}" + (f" (n={interval.n})" if interval.n is not None else "")


def notes(report: Report) -> list[str]:
    """What a reader must know to read the numbers."""
    seeds = len(report.seeds)
    spread = f"mean over {seeds} seeds [95 % interval, Student t]" if seeds >= FEWEST_SEEDS else "single run"
    if seeds == 2:
        spread = "mean over 2 seeds, too few for an interval"
    elif any(summary.n != seeds for summary in report.summary):
        spread += ", over fewer where a row says so"
    baseline, names = report.configuration["baseline"], headline(report)
    compared = f"win rate and KL are against `{baseline}`, whose own cost is not counted"
    alone = f"the cost of `{baseline}` itself is not counted"
    against = compared if {"win_rate", "kl_sequence"} & names.keys() else alone
    lines = [f"{spread}; {against}{'; length in tokens' if 'length' in names else ''}."]
    if any(method.get("best_of") for method in report.configuration["methods"]):
        lines.append("KL of best-of-n is the upper bound log n - (n - 1)/n; it samples n replies for each answer.")
    return [*lines, *_asked(report)]


def _asked(report: Report) -> Iterator[str]:
    """What judges and revisers took, a line for each method that has any."""
    for summary in report.summary:
        usage = {n.removeprefix("usage/"): x for n, x in summary.budget.items() if n.startswith("usage/")}
        if usage:
            told = ", ".join(f"{name} {value:,.6g}" for name, value in usage.items())
            yield f"{name_of(summary)}: judges and revisers report {told} per seed."


# --- as a page -------------------------------------------------------------------------------------------------------


def to_html(report: Report) -> str:
    """One self-contained page: no script, no remote asset, everything escaped."""
    environment = Environment(
        loader=PackageLoader("prefopt.bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(shown=shown, name_of=name_of, plain=printable)
    style = environment.get_template("report.css").render()
    style_hash = b64encode(sha256(style.encode()).digest()).decode()
    columns = list(headline(report).items())
    gold = [Point(name_of(s), s.metrics["gold_reward"]) for s in report.summary if "gold_reward" in s.metrics]
    frontier = [
        Point(name_of(s), s.metrics["gold_reward"], s.metrics["kl_sequence"])
        for s in report.summary
        if {"gold_reward", "kl_sequence"} <= s.metrics.keys()
    ]
    page = environment.get_template("report.html")
    return page.render(
        report=report,
        style_hash=style_hash,
        headline=columns,
        notes=notes(report),
        others=_other_metrics(report),
        forest=forest(gold),
        scatter=scatter(frontier),
        replies=_side_by_side(report),
        configuration=dump(report.configuration),
    )


def _other_metrics(report: Report) -> list[str]:
    names, first = dict.fromkeys(name for summary in report.summary for name in summary.metrics), headline(report)
    return [name for name in names if name not in first]


def _side_by_side(report: Report) -> list[tuple[str, list[tuple[str, Sample]]]]:
    """The prompts of the first seed, each with the reply of every method."""
    cells = [cell for cell in report.cells if cell.seed == report.seeds[0]]
    prompts = [sample.prompt for sample in cells[0].samples] if cells else []
    return [
        (prompt, [(name_of(cell), cell.samples[i]) for cell in cells if i < len(cell.samples)])
        for i, prompt in enumerate(prompts)
    ]


def printable(text: str) -> str:
    """Text with control and direction-changing characters spelled out, so that a page shows what is really there.

    >>> printable("a\\u202eb")
    'a\\\\u202eb'
    """
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)
