"""What functions, services and verifiers answer, as scores. A score is a finite number or missing with a reason that
names reward, row and sample; one number never stands for several completions. Nothing here knows where an answer came
from."""

from __future__ import annotations

import math
from collections.abc import Sequence as List
from typing import Any

from prefopt.api import Completion, RewardSource, Rollout, Score


class Unscorable(Exception):
    """A completion has no score; the message says why."""


def missing(reward: str, group: Rollout, sample: int, reason: str) -> Score:
    """No score for one completion of a group."""
    return Score(None, f"{reward}, row {group.index}, sample {sample}: {reason}")


def all_missing(reward: str, group: Rollout, reason: str) -> list[Score]:
    """No score for any completion of a group."""
    return [missing(reward, group, i, reason) for i in range(len(group.completions))]


def number(value: Any) -> float:
    """A finite number. Raises `Unscorable` for what is none.

    >>> number(True), number(3)
    (1.0, 3.0)
    """
    if isinstance(value, Unscorable):
        raise value
    if value is None:
        raise Unscorable("it gave no score")
    if not isinstance(value, int | float):
        raise Unscorable(f"it gave a {type(value).__name__} instead of a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise Unscorable(f"its score is {str(value)[:20]}, which is not finite")
    return float(value)


def scores(reward: str, group: Rollout, answer: Any) -> list[Score]:
    """One score for each completion of a group, from an answer that should be as many numbers; the whole answer, or one
    of them, may be an `Unscorable` instead."""
    wanted = f"instead of a list of {len(group.completions)} numbers"
    if isinstance(answer, Unscorable):
        return all_missing(reward, group, str(answer))
    if not isinstance(answer, list):
        return all_missing(reward, group, f"it gave a {type(answer).__name__} {wanted}")
    if len(answer) != len(group.completions):
        return all_missing(reward, group, f"it gave a list of {len(answer)} {wanted}")
    return [_score(reward, group, i, value) for i, value in enumerate(answer)]


def _score(reward: str, group: Rollout, sample: int, value: Any) -> Score:
    try:
        return Score(number(value))
    except Unscorable as error:
        return missing(reward, group, sample, str(error))


class Verifier(RewardSource):
    """Scores each completion by itself, by a rule."""

    def value(self, completion: Completion, row: Rollout) -> float:
        """The score of one completion. Raises `Unscorable` when the rule cannot be applied."""
        raise NotImplementedError(f"write {type(self).__name__}.value")

    def score(self, groups: List[Rollout]) -> list[list[Score]]:
        return [[self._scored(group, i) for i in range(len(group.completions))] for group in groups]

    def _scored(self, group: Rollout, sample: int) -> Score:
        try:
            return Score(self.value(group.completions[sample], group))
        except Unscorable as error:
            return missing(self.name, group, sample, str(error))


def column(row: Rollout, name: str) -> Any:
    """What a row holds in a column. Raises `Unscorable` when that is nothing."""
    if row.extra.get(name) in (None, "", [], ()):
        raise Unscorable(f"the row has nothing in column `{name}`; it has {', '.join(row.extra) or 'no columns'}")
    return row.extra[name]
