"""`prefopt judge compare`: systems by what a judge says about their replies to the same prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as List
from itertools import combinations
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from prefopt.bench.judging.ask import services_of
from prefopt.bench.judging.rank import Meeting, controlled, over_prompts, strengths, won
from prefopt.bench.report import commit_of
from prefopt.components import Services
from prefopt.config import resolved
from prefopt.config.judging import JudgingConfig
from prefopt.data.adapt import adapt
from prefopt.errors import ConfigError, DataError, ServiceError, redact
from prefopt.making.labels import in_drawn_order
from prefopt.making.work import Clock, Say, batches, rows_of
from prefopt.rows import Completion, Demonstration, Text
from prefopt.stats import Interval
from prefopt.verdicts import Pair, Verdict, added, both_orders

Replies = Mapping[str, tuple[Text, Completion]]


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Match(_Typed):
    """A system against another: its win rate, and the same at equal length."""

    system: str
    against: str
    win_rate: Interval
    length_controlled: Interval
    answered: int
    asked: int


class CompareReport(_Typed):
    """Systems as one judge sees them. `ranking` holds strengths in log-odds, the strongest first."""

    version: Literal[1] = 1
    commit: str
    configuration: dict[str, Any]
    prompts: int
    matches: list[Match]
    ranking: dict[str, Interval]
    usage: dict[str, float]
    missing: dict[str, int]


def compare(config: JudgingConfig, say: Say) -> CompareReport:
    """Asks about every two systems, or each and the baseline. Raises `DataError` when they answer no common prompt."""
    judge = _only(config)
    services = services_of(config)
    replies = {name: _replies(name, config, services) for name in config.systems}
    shared = [key for key in next(iter(replies.values())) if all(key in own for own in replies.values())]
    if not shared:
        raise DataError("the systems answer no prompt in common", where="systems")
    names = list(replies)
    met = [(a, b) for a, b in combinations(names, 2) if config.baseline in (None, a, b)]
    met = [(b, a) if a == config.baseline else (a, b) for a, b in met]
    pairs = [Pair(replies[a][key][0], replies[a][key][1], replies[b][key][1]) for a, b in met for key in shared]
    say(f"{len(shared):,} prompts, {len(met)} matches, {(2 if config.both_orders else 1) * len(pairs):,} questions")
    opened = judge.open(services)
    asked = both_orders(opened) if config.both_orders else in_drawn_order(opened, config.seed)
    verdicts, clock = list[Verdict](), Clock(len(pairs), "pairs", say)
    for batch in batches([1] * len(pairs), config.batch):
        verdicts += asked([pairs[i] for i in batch])
        clock.tick(len(verdicts))
    return _report(config, names, met, pairs, verdicts, len(shared))


def _only(config: JudgingConfig) -> Any:
    if config.judge is None or len(config.systems) < 2:
        raise ConfigError("a comparison has one `judge` and at least two `systems`")
    return config.judge


def _replies(name: str, config: JudgingConfig, services: Services) -> Replies:
    """A system's reply to each prompt, by the prompt; the first where it has several."""
    rows, _ = rows_of(config.systems[name], services, f"systems.{name}")
    found: dict[str, tuple[Text, Completion]] = {}
    for row in adapt(list(rows), Demonstration):
        if isinstance(row, Demonstration):
            found.setdefault(repr(row.prompt), (row.prompt, row.completion))
    return found


def _report(
    config: JudgingConfig,
    names: List[str],
    met: List[tuple[str, str]],
    pairs: List[Pair],
    verdicts: List[Verdict],
    prompts: int,
) -> CompareReport:
    meetings = [
        Meeting(i % prompts, names.index(a), names.index(b), verdict.value, len(pair.a.text) - len(pair.b.text))
        for i, (pair, verdict) in enumerate(zip(pairs, verdicts, strict=True))
        for a, b in [met[i // prompts]]
        if verdict.value is not None
    ]
    missing = Counter(v.reason for v in verdicts if v.value is None)
    if not meetings:
        raise ServiceError(f"no pair has a verdict: {next(iter(missing))}")
    ranking = over_prompts(meetings, lambda w: strengths(meetings, len(names), w), config.seed)
    order = sorted(range(len(names)), key=lambda i: -ranking[i].mean)
    report = CompareReport(
        commit=commit_of(),
        configuration=resolved(config),
        prompts=prompts,
        matches=[_match(names, a, b, meetings, prompts, config.seed) for a, b in met],
        ranking={names[i]: ranking[i] for i in order},
        usage=added([v.usage for v in verdicts]),
        missing=dict(missing.most_common(5)),
    )
    return CompareReport.model_validate(redact(report.model_dump(mode="json")))


def _match(names: List[str], a: str, b: str, meetings: List[Meeting], asked: int, seed: int) -> Match:
    own = [m for m in meetings if (names[m.a], names[m.b]) == (a, b)]
    if not own:
        raise ServiceError(f"no reply of `{a}` was compared with one of `{b}`")
    both = over_prompts(own, lambda w: np.array([won(own, w), controlled(own, w)]), seed)
    return Match(system=a, against=b, win_rate=both[0], length_controlled=both[1], answered=len(own), asked=asked)
