"""The harness's own measurements, as components like any plugin's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as List
from statistics import fmean
from typing import Self

from pydantic import PositiveInt, model_validator

from prefopt.api import (
    Comparison,
    ConfigError,
    DataError,
    Judge,
    Pair,
    RewardSource,
    Rollout,
    Score,
    ServiceError,
    Subject,
    Task,
    answered,
    both_orders,
)
from prefopt.data.adapt import adapt, adaptable
from prefopt.stats import calibration_error


class GoldReward(Task):
    """Mean reward of sampled replies, and of each named part of it."""

    name = "gold_reward"

    reward: RewardSource
    """What to score with."""
    samples: PositiveInt = 1
    """Replies for each prompt."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        scores = _flat(subject.reward(self.reward)(subject.rollouts(self.samples)))
        named = [part for part in scores[0].parts if all(part in s.parts for s in scores)]
        parts = {f"gold_reward/{part}": fmean(s.parts[part] for s in scores) for part in named}
        return {"gold_reward": fmean(_value(s) for s in scores), **parts}


class WinRate(Task):
    """Share of replies that score higher than the baseline's reply to the same prompt, or that a judge prefers to it; a
    tie is half a win."""

    name = "win_rate"

    reward: RewardSource | None = None
    """What to score with."""
    judge: Judge | None = None
    """Who judges instead, in both orders."""
    samples: PositiveInt = 1
    """Replies for each prompt."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.reward is None) == (self.judge is None):
            raise ValueError("write either `reward` or `judge`")
        return self

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        drawn = subject.rollouts(self.samples), subject.baseline(self.samples)
        if self.reward is None:
            return {"win_rate": fmean(self._judged(subject, *drawn))}
        score = subject.reward(self.reward)
        ours, theirs = (_flat(score(rollouts)) for rollouts in drawn)
        return {"win_rate": fmean(_half_step(_value(a) - _value(b)) for a, b in zip(ours, theirs, strict=True))}

    def _judged(self, subject: Subject, ours: List[Rollout], theirs: List[Rollout]) -> list[float]:
        """Raises `ServiceError` for a pair without a verdict: dropped, it would change what is measured."""
        assert self.judge is not None
        pairs = [
            Pair(mine.prompt, a, b, mine.extra)
            for mine, other in zip(ours, theirs, strict=True)
            for a, b in zip(mine.completions, other.completions, strict=True)
        ]
        verdicts = answered(both_orders(subject.judge(self.judge)), pairs)
        missing = [v.reason for v in verdicts if v.value is None]
        if missing:
            raise ServiceError(f"{len(missing)} of {len(pairs)} pairs have no verdict, the first one: {missing[0]}")
        return [v.value for v in verdicts if v.value is not None]


class Divergence(Task):
    """KL divergence from the baseline, estimated on samples of the model: for a whole reply and for a token of it."""

    name = "kl"
    paper = "The plain Monte-Carlo estimator (k1 in J. Schulman's note); for best-of-n the bound of arXiv:2401.01879"

    samples: PositiveInt = 1
    """Replies for each prompt."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        bound = subject.kl_bound()
        if bound is not None:
            return {"kl_sequence": bound}
        rollouts = subject.rollouts(self.samples)
        ratios = subject.log_ratios(rollouts)
        if ratios is None:
            return {}
        flat = [ratio for group in ratios for ratio in group]
        tokens = [len(c.ids or ()) for group in rollouts for c in group.completions]
        return {"kl_sequence": fmean(flat), "kl_token": sum(flat) / max(sum(tokens), 1)}


class Length(Task):
    """Mean number of tokens in a reply, and the share of replies that ended by themselves."""

    name = "length"

    samples: PositiveInt = 1
    """Replies for each prompt."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        drawn = [c for group in subject.rollouts(self.samples) for c in group.completions]
        return {"length": fmean(len(c.ids or ()) for c in drawn), "finished": fmean(c.finished for c in drawn)}


class PreferenceAccuracy(Task):
    """Share of held-out comparisons whose chosen completion has the higher mean log-probability of a token, a tie being
    one half; and the same by the implicit reward, log policy - log baseline, where there is a baseline. Ties of the
    label, and pairs the model cannot read whole, are left out; `preference_pairs` counts the rest."""

    name = "preference_accuracy"

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        rows = [row for row in subject.rows if adaptable(type(row), Comparison)]
        pairs = [p for p in adapt(rows, Comparison) if isinstance(p, Comparison) and p.preference != 0.5]
        means = subject.mean_logps(_as_rollouts(pairs))
        if means is None:
            return {}
        if not pairs:
            raise ConfigError("task `preference_accuracy` needs held-out comparisons")
        told = [(pair, a - b) for pair, (a, b) in zip(pairs, means, strict=True) if a is not None and b is not None]
        if not told:
            raise DataError(
                f"none of {len(pairs)} held-out comparisons is short enough for the model to read",
                where="task `preference_accuracy`",
                fix="Hold out comparisons that fit, or cut them with data.max_length and data.overflow.",
            )
        metrics = {"preference_accuracy": fmean(_half_step(margin) for _, margin in told)}
        ratios = subject.log_ratios(_as_rollouts([pair for pair, _ in told]))
        if ratios is not None:
            metrics["implicit_accuracy"] = fmean(_half_step(a - b) for a, b in ratios)
        return {**metrics, "preference_pairs": float(len(told))}


class RewardQuality(Task):
    """How well a reward model predicts held-out comparisons, or the pairs of rankings: accuracy and calibration against
    the labels, and agreement with a reference reward. Pairs without a better side are left out of accuracy."""

    name = "reward_quality"

    reward: RewardSource | None = None
    """A reward to agree with, such as a world's gold reward; pairs it calls equal are left out."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        rows = [row for row in subject.rows if adaptable(type(row), Comparison)]
        pairs = [pair for pair in adapt(rows, Comparison) if isinstance(pair, Comparison)]
        scores = subject.scores(_as_rollouts(pairs))
        if scores is None:
            return {}
        if not pairs:
            raise ConfigError("task `reward_quality` needs held-out comparisons")
        margins = [a - b for a, b in scores]
        chances = [1 / (1 + math.exp(-m)) if m > -700 else 0.0 for m in margins]
        labels = [pair.preference for pair in pairs]
        metrics: dict[str, float | None] = {
            "reward_accuracy": _accuracy(margins, [label - 0.5 for label in labels]),
            "reward_ece": calibration_error(*_both_ways(chances, labels)),
            "reward_brier": fmean((p - y) ** 2 for p, y in zip(chances, labels, strict=True)),
        }
        if self.reward is not None:
            gold = subject.reward(self.reward)(_as_rollouts(pairs))
            metrics["gold_agreement"] = _accuracy(margins, [_value(a) - _value(b) for a, b in gold])
        return {name: x for name, x in metrics.items() if x is not None}


def _as_rollouts(rows: List[Comparison]) -> list[Rollout]:
    return [Rollout(prompt=r.prompt, index=r.index, extra=r.extra, completions=(r.chosen, r.rejected)) for r in rows]


def _accuracy(margins: List[float], truth: List[float]) -> float | None:
    """Share of pairs with the right sign, a zero margin counting one half; pairs without a truth are left out, and None
    means that all were."""
    told = [(m, t) for m, t in zip(margins, truth, strict=True) if t != 0]
    return fmean(_half_step(m * math.copysign(1, t)) for m, t in told) if told else None


def _both_ways(chances: List[float], labels: List[float]) -> tuple[list[float], list[float]]:
    """Each pair seen from both sides: which side is called chosen carries no information about calibration."""
    return [*chances, *(1 - p for p in chances)], [*labels, *(1 - y for y in labels)]


def _half_step(x: float) -> float:
    return 0.5 if x == 0 else float(x > 0)


def _flat(scores: List[List[Score]]) -> list[Score]:
    return [score for group in scores for score in group]


def _value(score: Score) -> float:
    """The number of a score. A missing one stops the measurement: it is never taken for 0."""
    if score.value is None:
        raise ConfigError(f"a reply could not be scored: {score.reason}")
    return score.value
