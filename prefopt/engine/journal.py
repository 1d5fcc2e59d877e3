"""What a run drew and how it was scored, one file for each step, written whole before it is used. A step that is taken
again after a resume reads it instead of drawing once more; a finished run keeps it all as one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any, Final, NamedTuple

from prefopt.data.table import write_rollouts
from prefopt.engine.folder import write_text
from prefopt.rows import Completion, Role, Rollout, Row, show_text

TABLE: Final = "rollouts.parquet"


class Unused(NamedTuple):
    """Replies that a step went without: a whole group that was refused or left out, or those of a group that have no
    score."""

    group: Rollout
    reasons: List[str]
    """Why the step goes without each of them."""


@dataclass(frozen=True)
class Collected:
    """The scored draws of a step, and what was counted and measured while they were made."""

    rollouts: list[Rollout]
    metrics: Mapping[str, float] = field(default_factory=dict)
    sampled: int = 0
    """Tokens drawn, those that were not kept included."""
    drawn: List[List[int]] | None = None
    """The rows that were drawn for together, one time after the other, those that were not kept included; None for a
    step that an older version kept."""
    unused: List[Unused] = ()
    """For the table alone: what is read again has none."""


class Journal:
    """The steps of a run, in a folder of its own. Only the main rank writes."""

    def __init__(self, folder: Path, active: bool) -> None:
        self.folder, self.active = folder, active

    def write(self, step: int, found: Collected) -> None:
        """Keeps a step, all of it or nothing."""
        if not self.active:
            return
        self.folder.mkdir(exist_ok=True)
        record = {
            "metrics": dict(found.metrics),
            "sampled": found.sampled,
            "drawn": found.drawn,
            "rollouts": list(map(_plain, found.rollouts)),
            "unused": [{**_plain(group), "reasons": reasons} for group, reasons in found.unused],
        }
        write_text(self._file(step), json.dumps(record, ensure_ascii=False) + "\n")

    def read(self, step: int, row: Callable[[int], Row]) -> Collected | None:
        """A step that was kept; None when it was not. `row` gives the prompts by index."""
        if not self._file(step).exists():
            return None
        record = json.loads(self._file(step).read_text("utf-8"))
        rollouts = [_rollout(group, row(group["row"])) for group in record["rollouts"]]
        return Collected(rollouts, record["metrics"], record["sampled"], record.get("drawn"))

    def close(self, table: Path) -> None:
        """Writes the whole journal as one table, a row for each completion, and removes the files."""
        if self.active and self.folder.exists():
            files = sorted(self.folder.glob("*.json"))
            write_rollouts(table, (_lines(int(path.stem), json.loads(path.read_text("utf-8"))) for path in files))
            rmtree(self.folder)

    def _file(self, step: int) -> Path:
        return self.folder / f"{step:08d}.json"


def _plain(group: Rollout) -> dict[str, Any]:
    completions = [asdict(completion) for completion in group.completions]
    return {"row": group.index, "prompt": show_text(group.prompt), "roles": group.roles, "completions": completions}


def _rollout(group: Mapping[str, Any], row: Row) -> Rollout:
    return Rollout(
        prompt=row.prompt,
        index=group["row"],
        weight=row.weight,
        extra=row.extra,
        completions=tuple(_completion(fields) for fields in group["completions"]),
        roles=tuple(map(Role, group["roles"])),
    )


def _completion(fields: Mapping[str, Any]) -> Completion:
    lists: dict[str, List[Any] | None] = {name: fields[name] for name in ("ids", "logps")}
    return Completion(**{**fields, **{name: None if x is None else tuple(x) for name, x in lists.items()}})


def _lines(step: int, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (*record["rollouts"], *record.get("unused", ())):
        completions, reasons = group["completions"], group.get("reasons")
        roles = group["roles"] or [Role.SAMPLE] * len(completions)
        for role, completion, reason in zip(roles, completions, reasons or [None] * len(completions), strict=True):
            shared = {"step": step, "row": group["row"], "prompt": group["prompt"], "completion": completion["text"]}
            shared |= {"used": reasons is None, "reason": reason}
            names = ("source", "score", "finished", "ids", "logps")
            yield {**shared, "role": Role(role).name.lower(), **{name: completion[name] for name in names}}
