"""`prefopt judge label`: rows with a judge's verdicts on them, appended to a file as they come. What is there already
is not asked again."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prefopt.bench.judging.ask import Clock, Say, batches, in_drawn_order, rows_of, services_of
from prefopt.components import Judge
from prefopt.config.judging import JudgingConfig
from prefopt.errors import ConfigError, DataError, ServiceError, redact
from prefopt.rows import Comparison, Completion, Ranking, Rollout, Row, Text
from prefopt.verdicts import Comparer, Pair, Verdict, added, both_orders, places, questions, win_rates

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
    rows = [Item.of(row, config) for row in rows_of(config.data, services, "data")[0]]
    file = LabelFile(Path(config.out) / LABELS, _by(judge, config))
    todo = [item for item in rows if item.key not in file.keys]
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
    todo: List[Item], compare: Comparer, config: JudgingConfig, file: LabelFile, say: Say
) -> tuple[Counter[str], dict[str, float]]:
    clock, missing, usage = Clock(len(todo), "rows", say), Counter[str](), dict[str, float]()
    for batch in batches([len(item.met) for item in todo], config.batch):
        some = [todo[i] for i in batch]
        verdicts = iter(compare([pair for item in some for pair in item.pairs()]))
        told = [(item, [next(verdicts) for _ in item.met]) for item in some]
        file.append(item.record(found, file.by) for item, found in told if not _why(found))
        missing.update(_why(found) for _, found in told if _why(found))
        usage = added([usage, *(v.usage for _, found in told for v in found)])
        clock.tick(batch.stop, f", {usage.get('calls', 0):,.0f} calls" + _cost(usage))
    return missing, usage


def _cost(usage: dict[str, float]) -> str:
    return f", cost {usage['cost']:.4g}" if "cost" in usage else ""


def _why(verdicts: List[Verdict]) -> str:
    """Why a row has no label: empty when it has one. One missing comparison makes the whole row's missing."""
    return next((v.reason for v in verdicts if v.value is None), "")


def _by(judge: Judge, config: JudgingConfig) -> dict[str, Any]:
    """Who labelled, and how."""
    settings = redact(judge.model_dump(mode="json"))
    return {"judge": settings, "both_orders": config.both_orders, "pairing": config.pairing}


@dataclass(frozen=True)
class Item:
    """A row to label: its replies, and which of them meet."""

    row: Row
    replies: tuple[Completion, ...]
    met: tuple[tuple[int, int], ...]
    key: str

    @classmethod
    def of(cls, row: Row, config: JudgingConfig) -> Item:
        """Raises `DataError` for a row without two replies."""
        replies: tuple[Completion, ...] = ()
        if isinstance(row, Comparison):
            replies = (row.chosen, row.rejected)
        elif isinstance(row, Ranking | Rollout):
            replies = row.completions
        if len(replies) < 2:
            fix = "Write two or more replies for each prompt, as `completions`, or as `chosen` and `rejected`."
            raise DataError("a row without two replies cannot be compared", where=f"data, row {row.index}", fix=fix)
        named = json.dumps([row.index, repr(row.prompt), *(reply.text for reply in replies)])
        met = tuple(places(len(replies), config.pairing))
        return cls(row, replies, met, blake2b(named.encode(), digest_size=16).hexdigest())

    def pairs(self) -> list[Pair]:
        return [Pair(self.row.prompt, self.replies[i], self.replies[j], self.row.extra) for i, j in self.met]

    def record(self, verdicts: List[Verdict], by: str) -> dict[str, Any]:
        """The row with its labels: `preference` and `votes` of two replies, `scores` (win rates) of several."""
        shared = {**self.row.extra, "prompt": _plain(self.row.prompt)}
        judged = {"key": self.key, "by": by, "usage": added([v.usage for v in verdicts])}
        if len(self.replies) == 2:
            return {**shared, **self._two(verdicts[0]), "judged": {**judged, "tie": verdicts[0].tie}}
        told = [
            {"places": met, "better": v.a_better, "tie": v.tie, "votes": v.ballot}
            for met, v in zip(self.met, verdicts, strict=True)
        ]
        rates = win_rates(len(self.replies), self.met, verdicts)
        texts = [reply.text for reply in self.replies]
        return {**shared, "completions": texts, "scores": rates, "judged": {**judged, "verdicts": told}}

    def _two(self, verdict: Verdict) -> dict[str, Any]:
        value = 0.5 if verdict.value is None else verdict.value
        turned = verdict.turned() if value < 0.5 else verdict
        sides = self.replies if value >= 0.5 else self.replies[::-1]
        return {
            "chosen": sides[0].text,
            "rejected": sides[1].text,
            "preference": max(value, 1 - value),
            "votes": turned.ballot,
        }


def _plain(prompt: Text) -> Any:
    return prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]


class LabelFile:
    """Labelled rows, one on each line. Raises `ConfigError` when another judge wrote the file."""

    def __init__(self, path: Path, by: dict[str, Any]) -> None:
        self.path = path
        self.by = blake2b(json.dumps(by, sort_keys=True).encode(), digest_size=8).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        judged = [json.loads(line)["judged"] for line in _whole_lines(path)]
        if any(one["by"] != self.by for one in judged):
            fix = "Choose another `out`: labels of two judges in one file could not be told apart."
            raise ConfigError(
                "the labels there are by another judge, or were asked for otherwise", where=str(path), fix=fix
            )
        self.keys = {str(one["key"]) for one in judged}
        (path.parent / "label.json").write_text(json.dumps({self.by: by}, indent=1) + "\n", "utf-8")

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Adds rows, and waits until they are on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file; what was cut short behind the last of them is removed."""
    if not path.exists():
        return []
    found = path.read_bytes()
    whole = found[: found.rfind(b"\n") + 1]
    if len(whole) < len(found):
        os.truncate(path, len(whole))
    return [line for line in whole.decode("utf-8").split("\n") if line]
