"""`prefopt judge label`: rows with a judge's verdicts on them, appended to a file as they come. What is there already
is not asked again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.bench.judging.ask import services_of
from prefopt.components import Judge
from prefopt.config.judging import JudgingConfig
from prefopt.errors import ConfigError, ServiceError, redact
from prefopt.making.labels import Item, compared, in_drawn_order, why_not
from prefopt.making.lines import RowsFile, key_of, several
from prefopt.making.work import Clock, Say, batches, rows_of
from prefopt.verdicts import Comparer, added, both_orders, questions

LABELS = "labels.jsonl"


@dataclass(frozen=True)
class Result:
    """Where the labels are, how many rows have one, why the others have none, and what those of this time took."""

    path: Path
    labelled: int
    missing: dict[str, int]
    usage: dict[str, float]


def label(config: JudgingConfig, say: Say) -> Result:
    """Labels every row. Raises `ServiceError` when more rows than allowed have no verdict; the others are kept."""
    judge = config.judge
    if judge is None:
        raise ConfigError("labels come from one judge", where="judges", fix="Write `judge: {name: ...}`.")
    services = services_of(config)
    found = rows_of(config.data, services, "data")[0]
    ranked = several(found)
    rows = [Item.of(row, config.pairing, ranked) for row in found]
    by = _by(judge, config)
    file = RowsFile(Path(config.out) / LABELS, "judged", by)
    (file.path.parent / "label.json").write_text(json.dumps({file.by: by}, indent=1) + "\n", "utf-8")
    todo = [item for item in rows if key_of(item.row) not in file.keys]
    count = questions([len(item.replies) for item in todo], config.pairing, 2 if config.both_orders else 1)
    say(f"{len(rows):,} rows, {len(rows) - len(todo):,} labelled before, {count:,} questions to ask")
    opened = judge.open(services)
    compare = both_orders(opened) if config.both_orders else in_drawn_order(opened, config.seed)
    missing, usage = _label(todo, compare, config, file, say)
    total = sum(missing.values())
    if total > config.max_missing * max(len(rows), 1):
        reasons = "; ".join(f"{count:,} times: {reason}" for reason, count in missing.most_common(3))
        fix = f"The others are in {file.path}; the same command asks for these again."
        raise ServiceError(f"{total:,} of {len(rows):,} rows have no verdict. {reasons}", fix=fix)
    return Result(file.path, len(rows) - total, dict(missing), usage)


def _label(
    todo: List[Item], compare: Comparer, config: JudgingConfig, file: RowsFile, say: Say
) -> tuple[Counter[str], dict[str, float]]:
    clock, missing, usage = Clock(len(todo), "rows", say), Counter[str](), dict[str, float]()
    for batch in batches([len(item.met) for item in todo], config.batch):
        some = [todo[i] for i in batch]
        told = list(zip(some, compared(some, compare), strict=True))
        file.append((key_of(item.row), item.record(found)) for item, found in told if not why_not(found))
        missing.update(why_not(found) for _, found in told if why_not(found))
        usage = added([usage, *(v.usage for _, found in told for v in found)])
        clock.tick(batch.stop, f", {usage.get('calls', 0):,.0f} calls" + _cost(usage))
    return missing, usage


def _cost(usage: dict[str, float]) -> str:
    return f", cost {usage['cost']:.4g}" if "cost" in usage else ""


def _by(judge: Judge, config: JudgingConfig) -> dict[str, Any]:
    """Who labelled, and how."""
    settings = redact(judge.model_dump(mode="json"))
    return {"judge": settings, "both_orders": config.both_orders, "pairing": config.pairing}
