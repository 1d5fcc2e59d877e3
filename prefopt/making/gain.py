"""What revising was worth, by a reward that the reviser never saw."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as List
from typing import Any

from pydantic import BaseModel, ConfigDict

from prefopt.components import RewardSource, Scorer
from prefopt.data.formats import BY_NAME
from prefopt.rows import Completion, Rollout
from prefopt.stats import Interval, t_interval


class Gain(BaseModel):
    """Mean rewards of drafts and of their revisions, and of the difference, each with Student's t interval over rows.
    `unscored` rows lack one of the two."""

    model_config = ConfigDict(frozen=True)

    reward: str
    drafts: Interval
    revisions: Interval
    gain: Interval
    unscored: int

    def __str__(self) -> str:
        means = f"{self.reward} of drafts {self.drafts.mean:.3g}, of revisions {self.revisions.mean:.3g}"
        low, high = self.gain.low, self.gain.high
        interval = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
        left_out = f", {self.unscored:,} rows not scored" if self.unscored else ""
        return f"{means}: gain {self.gain.mean:.3g}{interval}{left_out}"


def gain_of(source: RewardSource, score: Scorer, records: List[Mapping[str, Any]]) -> Gain | None:
    """The gain over revised rows; None when none could be scored."""
    scores = score([_both(record, i) for i, record in enumerate(records)])
    known = [
        (draft.value, revision.value)
        for draft, revision in scores
        if draft.value is not None and revision.value is not None
    ]
    if not known:
        return None
    drafts, revisions = zip(*known, strict=True)
    gains = [after - before for before, after in known]
    return Gain(
        reward=source.name,
        drafts=t_interval(drafts),
        revisions=t_interval(revisions),
        gain=t_interval(gains),
        unscored=len(scores) - len(known),
    )


def _both(record: Mapping[str, Any], index: int) -> Rollout:
    """A row's draft and revision as replies to one prompt."""
    row = BY_NAME["prompt"].parse(dict(record))
    completions = (Completion(record["draft"]), Completion(record["completion"]))
    return Rollout(prompt=row.prompt, index=index, extra=row.extra, completions=completions)
