"""A stage that makes rows, from its configuration to its folder. What is written stays: a stage that is stopped goes on
with the rows that are not there yet."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from prefopt.components import RewardSource
from prefopt.config import anchored, dump, named_files, resolved
from prefopt.config.making import Making, ReviseConfig
from prefopt.data.check import write_rejects
from prefopt.engine.failures import explained
from prefopt.engine.folder import RunFolder, write_text
from prefopt.engine.memory import peak_bytes, reset_peak
from prefopt.engine.origin import compare, surroundings
from prefopt.engine.ranks import Ranks
from prefopt.engine.record import TIMINGS, Recorder
from prefopt.engine.stops import stop_requests
from prefopt.errors import Preempted, ServiceError, redact
from prefopt.making.gain import Gain, gain_of
from prefopt.making.kinds import Kind, Outcome, kind_of
from prefopt.making.lines import RowsFile, append, key_of, whole_lines
from prefopt.making.services import MakingServices
from prefopt.making.work import Clock, Say, batches, rows_of
from prefopt.plugins import Plugins
from prefopt.preflight import check
from prefopt.rows import Row
from prefopt.verdicts import added

WORK = "work.jsonl"
"""What each batch took, and which of its rows came to nothing."""
WORKING: Final = {"plugins", "batch", "max_missing"}
"""Settings that say how rows are worked on, and not what they are."""


@dataclass(frozen=True)
class Made:
    """A finished stage: its rows, how many there are, why the others are not, how many replies were cut before their
    end, and what revising gained."""

    path: Path
    rows: int
    missing: Mapping[str, int]
    cut: int = 0
    gain: Gain | None = None

    @property
    def lines(self) -> list[str]:
        """The same in words."""
        without = [f"{count:,} rows left out: {reason}" for reason, count in self.missing.items()]
        cut = f"{self.cut:,} of the texts drawn were cut at max_new_tokens"
        return [
            *without,
            *([cut] if self.cut else []),
            *([] if self.gain is None else [str(self.gain)]),
            f"finished: {self.rows:,} rows: {self.path}",
        ]


def make(config: Making, plugins: Plugins, *, warn: Say = print, say: Say = lambda line: None) -> Made:
    """Makes what is not made yet; `say` hears how far it has come. Raises `PrefoptError` for whatever the user can
    mend; no row that is written is lost."""
    check(config, plugins.registry)
    with explained(config.run.dir):
        return _make(anchored(config), plugins, warn, say)


def _make(config: Making, plugins: Plugins, warn: Say, say: Say) -> Made:
    ranks, folder = Ranks(config.run.device, config.run.threads), RunFolder(Path(config.run.dir))
    if ranks.main:
        if not folder.info.exists():
            folder.create()
        with folder.locked():
            _Stage(config, plugins, ranks, folder, warn, say).run()
    ranks.wait()
    return read_back(config)


def read_back(config: Making) -> Made:
    """What a finished stage says of itself."""
    facts = json.loads((Path(config.run.dir) / "result.json").read_text("utf-8"))
    gain = Gain.model_validate(facts["gain"]) if "gain" in facts else None
    return Made(config.rows, facts["rows"], facts["missing"], facts["cut"], gain)


@dataclass
class _Stage:
    """One stage at work."""

    config: Making
    plugins: Plugins
    ranks: Ranks
    folder: RunFolder
    warn: Say
    say: Say

    @cached_property
    def services(self) -> MakingServices:
        return MakingServices(self.config, self.plugins, self.ranks.device, self.folder.kept, self.warn)

    def run(self) -> None:
        began = time.perf_counter()
        reset_peak(self.ranks.device)
        try:
            with self.services.closing:
                self._run()
        finally:
            used = {"total_seconds": time.perf_counter() - began, "peak_memory_bytes": peak_bytes(self.ranks.device)}
            Recorder(self.folder.path, active=True).line(TIMINGS, used)

    def _run(self) -> None:
        self._describe()
        rows, rejects = rows_of(self.config.data, self.services, "data")
        write_rejects(self.folder.path / "rejects.jsonl", rejects)
        kind = kind_of(self.config, self.services, rows)
        file = RowsFile(self.config.rows, kind.field, _settings(self.config))
        self.config.rows.touch()
        whole_lines(self._path)  # what was cut short is not gone on with
        todo = [row for row in rows if key_of(row) not in file.keys]
        with stop_requests() as requests:
            self._work(todo, kind, file, requests)
        self._finish(len(rows), file)

    def _work(self, todo: List[Row], kind: Kind, file: RowsFile, requests: List[int]) -> None:
        clock = Clock(len(todo), "rows", self.say)
        for batch in batches([1] * len(todo), self.config.batch):
            if requests:
                fix = "The same command goes on with the others."
                raise Preempted(f"stopped on request; {len(file.keys):,} rows are written", fix=fix)
            some = [todo[i] for i in batch]
            before = self.services.sampled, self.services.read, self.services.cut
            outcomes = kind.make(some)
            told = list(zip(map(key_of, some), outcomes, strict=True))
            append(self._path, [self._cost(*before, told)])
            file.append((key, outcome.record) for key, outcome in told if outcome.record is not None)
            clock.tick(batch.stop)

    @property
    def _path(self) -> Path:
        return self.folder.path / WORK

    def _cost(self, sampled: int, read: int, cut: int, told: List[tuple[str, Outcome]]) -> dict[str, Any]:
        """What a batch took, written before its rows: a batch that is cut short was paid for all the same."""
        return {
            "sampled": self.services.sampled - sampled,
            "forward": self.services.read - read,
            "cut": self.services.cut - cut,
            "usage": added([outcome.usage for _, outcome in told]),
            "missing": [
                {"key": key, "reason": outcome.reason, "fault": outcome.fault}
                for key, outcome in told
                if outcome.record is None
            ],
        }

    def _finish(self, total: int, file: RowsFile) -> None:
        """Says how it went. Raises `ServiceError` when more rows than allowed came to nothing."""
        work = [json.loads(line) for line in whole_lines(self._path)]
        last = {one["key"]: one for batch in work for one in batch["missing"] if one["key"] not in file.keys}
        missing = Counter(one["reason"] for one in last.values())
        faults = sum(one["fault"] for one in last.values())
        if faults > self.config.max_missing * max(total, 1):
            reasons = "; ".join(f"{count:,} times: {reason}" for reason, count in missing.most_common(3))
            fix = f"The others are in {file.path}; the same command asks for these again."
            raise ServiceError(f"{faults:,} of {total:,} rows have no result. {reasons}", fix=fix)
        budget = {name: sum(batch[name] for batch in work) for name in ("forward", "sampled")}
        facts = {"outcome": "finished", "rows": len(file.keys), "missing": dict(missing)}
        facts["cut"] = sum(batch["cut"] for batch in work)
        facts |= {"budget": {"backward": 0, **budget}, "usage": added([batch["usage"] for batch in work])}
        gain = self._gain(file)
        self.folder.write(self.folder.result, {**facts, **({} if gain is None else {"gain": gain.model_dump()})})

    def _gain(self, file: RowsFile) -> Gain | None:
        source = self.config.measure if isinstance(self.config, ReviseConfig) else None
        return gain_of(source, source.open(self.services), file.records()) if isinstance(source, RewardSource) else None

    def _describe(self) -> None:
        """`config.yaml` and `run.json`: what was asked for, and with which versions and data."""
        now = surroundings(named_files(self.config))
        if self.folder.info.exists():
            compare(json.loads(self.folder.info.read_text("utf-8")), now, self.warn)
            return
        write_text(self.folder.config, dump(redact(resolved(self.config))))
        self.folder.write(self.folder.info, now)


def _settings(config: Making) -> dict[str, Any]:
    """What makes the rows what they are."""
    settings = config.model_dump(mode="json", exclude=WORKING)
    made: dict[str, Any] = redact({**settings, "run": {"seed": config.run.seed}})
    return made
