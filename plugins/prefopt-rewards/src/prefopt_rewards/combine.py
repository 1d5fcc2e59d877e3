"""Rewards made of other rewards: weighted sums and ensembles. What one of them could not score, the whole cannot
either."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from statistics import fmean, pstdev
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, model_validator

from prefopt.api import PluginError, RewardSource, Rollout, Score, Scorer, Services
from prefopt_rewards.scores import Unscorable, missing, number

TAKEN = frozenset({"mean", "missing", "total"})
"""What `reward/...` already means something else for."""
LISTED = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""For a tuple that is a list in a file, where a component stands around it."""
Combine = Callable[[Mapping[str, Score]], Score]


class Part(BaseModel):
    """A summand."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    source: RewardSource
    """What scores."""
    weight: float = 1.0
    """What the score is multiplied by, once it is clipped."""
    clip: Annotated[tuple[float, float] | None, LISTED] = None
    """The least and the most the score counts for."""
    label: str = ""
    """Its name in metrics, `reward/LABEL`; default: the name of the source."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.clip is not None and self.clip[0] > self.clip[1]:
            raise ValueError("`clip` is [least, most]")
        return self

    def share(self, value: float) -> float:
        """What a score of the source adds to the sum."""
        low, high = self.clip or (-math.inf, math.inf)
        return self.weight * min(max(value, low), high)


class Weighted(RewardSource):
    """The weighted sum of other rewards."""

    name = "weighted"

    parts: tuple[Part, ...] = Field(min_length=1)
    """The summands, each with `source`, `weight`, `clip`, `label`."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        labels = [part.label or part.source.name for part in self.parts]
        if len(set(labels)) < len(labels):
            raise ValueError("two parts have one name: give each a `label`")
        taken = TAKEN & set(labels)
        if taken:
            raise ValueError(f"`{min(taken)}` is the name of another metric: give that part another `label`")
        return self

    def open(self, services: Services) -> Scorer:
        parts = {part.label or part.source.name: part for part in self.parts}

        def total(scores: Mapping[str, Score]) -> Score:
            shares = {label: parts[label].share(_value(label, score)) for label, score in scores.items()}
            inner = {f"{label}/{key}": x for label, score in scores.items() for key, x in score.parts.items()}
            return Score(number(math.fsum(shares.values())), parts=shares | inner)

        return _combined(self.name, {label: part.source.open(services) for label, part in parts.items()}, total)


class Ensemble(RewardSource):
    """Several rewards of the same thing as one: their mean, or something more careful where they disagree."""

    name = "ensemble"
    paper = "Coste et al. 2023, arXiv:2310.02743: `mean`, `min` (WCO) and `uncertainty` (UWO)"

    members: tuple[RewardSource, ...] = Field(min_length=2)
    """The rewards, on one scale."""
    aggregate: Literal["mean", "min", "uncertainty"] = "mean"
    """The mean, the smallest, or the mean minus `penalty` times the variance (that of the members, divided by their
    number)."""
    penalty: NonNegativeFloat = 0.1
    """λ of `uncertainty`."""

    def open(self, services: Services) -> Scorer:
        labels = [f"{i} ({member.name})" for i, member in enumerate(self.members)]
        members = {label: member.open(services) for label, member in zip(labels, self.members, strict=True)}
        return _combined(self.name, members, self._aggregated)

    def _aggregated(self, scores: Mapping[str, Score]) -> Score:
        values = [_value(f"member {label}", score) for label, score in scores.items()]
        spread = pstdev(values)
        cautious = {
            "mean": fmean(values),
            "min": min(values),
            "uncertainty": fmean(values) - self.penalty * spread**2,
        }
        return Score(number(cautious[self.aggregate]), parts={"disagreement": spread})


def _value(label: str, score: Score) -> float:
    if score.value is None:
        raise Unscorable(f"{label} is missing: {score.reason}")
    try:
        return number(score.value)
    except Unscorable as error:
        raise Unscorable(f"{label} is missing: {error}") from None


def _combined(reward: str, scorers: Mapping[str, Scorer], combine: Combine) -> Scorer:
    """The scorer that gives `combine` all scores of a completion, by the label of the reward they are from."""

    def one(group: Rollout, sample: int, scores: Mapping[str, Score]) -> Score:
        try:
            return combine(scores)
        except Unscorable as error:
            return missing(reward, group, sample, str(error))

    def all_of(groups: List[Rollout]) -> list[list[Score]]:
        found = {label: _complete(label, scorer(groups), groups) for label, scorer in scorers.items()}
        return [
            [one(group, i, {label: s[g][i] for label, s in found.items()}) for i in range(len(group.completions))]
            for g, group in enumerate(groups)
        ]

    return all_of


def _complete(label: str, scores: Any, groups: List[Rollout]) -> list[list[Score]]:
    if [len(own) for own in scores] != [len(group.completions) for group in groups]:
        raise PluginError(f"reward {label} did not give one score for each completion")
    return list(scores)
