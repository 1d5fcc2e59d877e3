"""`prefopt judge evaluate`: judges against pairs whose better side people have named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as List
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from prefopt.bench.judging.ask import services_of
from prefopt.bench.judging.measures import Judged, measured, spent
from prefopt.bench.report import commit_of
from prefopt.components import Judge
from prefopt.config import resolved
from prefopt.config.judging import JudgingConfig
from prefopt.data.adapt import adapt
from prefopt.errors import DataError, redact
from prefopt.making.labels import in_drawn_order
from prefopt.making.work import Clock, Say, batches, rows_of
from prefopt.rows import Comparison
from prefopt.stats import Interval
from prefopt.verdicts import Comparer, Pair, Verdict, agreed, answered

REASONS = 5


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JudgeResult(_Typed):
    """A judge, measured. `usage` is what all of it took; `missing` the commonest reasons for no verdict."""

    label: str
    settings: dict[str, Any]
    metrics: dict[str, Interval]
    usage: dict[str, float]
    missing: dict[str, int] = {}


class JudgeReport(_Typed):
    """Judges on the same pairs. `version` changes when a field changes its meaning."""

    version: Literal[1] = 1
    commit: str
    pairs: int
    """Pairs asked about."""
    left_out: int
    """Rows that could not be used."""
    configuration: dict[str, Any]
    judges: list[JudgeResult]


def evaluate(config: JudgingConfig, say: Say) -> JudgeReport:
    """Asks every judge about every pair and measures it. Raises `DataError` when there is nothing to ask about."""
    services = services_of(config)
    rows, rejects = rows_of(config.data, services, "data")
    pairs = [row for row in adapt(list(rows), Comparison) if isinstance(row, Comparison)]
    if not pairs:
        raise DataError("there are no comparisons to evaluate judges on", where="data")
    orders = 2 if config.both_orders else 1
    say(
        f"{len(pairs):,} pairs, {len(config.named)} judges, {orders * config.repeats * len(pairs):,} questions for each"
    )
    results = []
    for label, judge in config.named.items():
        judged = ask_all(judge.open(services), pairs, config, partial(_say, say, label))
        results.append(_result(label, judge, judged, config.seed))
    report = JudgeReport(
        commit=commit_of(), pairs=len(pairs), left_out=len(rejects), configuration=resolved(config), judges=results
    )
    return JudgeReport.model_validate(redact(report.model_dump(mode="json")))


def _say(say: Say, label: str, line: str) -> None:
    say(f"{label}: {line}")


def _result(label: str, judge: Judge, judged: List[Judged], seed: int) -> JudgeResult:
    why = Counter(pair.verdict.reason for pair in judged if pair.verdict.value is None)
    return JudgeResult(
        label=label,
        settings=judge.model_dump(mode="json"),
        metrics=measured(judged, seed),
        usage=dict(spent(judged)),
        missing=dict(why.most_common(REASONS)),
    )


def ask_all(compare: Comparer, pairs: List[Comparison], config: JudgingConfig, say: Say) -> list[Judged]:
    """The verdicts on all pairs, a batch at a time."""
    clock, found = Clock(len(pairs), "pairs", say), list[Judged]()
    for batch in batches([1] * len(pairs), config.batch):
        found += _asked(compare, [pairs[i] for i in batch], config)
        clock.tick(len(found))
    return found


def _asked(compare: Comparer, rows: List[Comparison], config: JudgingConfig) -> list[Judged]:
    draws = [[_pair(row, draw) for row in rows] for draw in range(config.repeats)]
    if config.both_orders:
        both = [_both(compare, pairs) for pairs in draws]
        again = [tuple(agreed(*draw[i]) for draw in both[1:]) for i in range(len(rows))]
        return [Judged(row, agreed(*both[0][i]), both[0][i], again[i]) for i, row in enumerate(rows)]
    once = [in_drawn_order(compare, config.seed)(pairs) for pairs in draws]
    return [Judged(row, once[0][i], None, tuple(draw[i] for draw in once[1:])) for i, row in enumerate(rows)]


def _pair(row: Comparison, draw: int) -> Pair:
    return Pair(row.prompt, row.chosen, row.rejected, row.extra, draw)


def _both(compare: Comparer, pairs: List[Pair]) -> list[tuple[Verdict, Verdict]]:
    found = answered(compare, [*pairs, *(pair.turned() for pair in pairs)])
    return [(found[i], found[i + len(pairs)].turned()) for i in range(len(pairs))]
