"""The core's own judges: rewards as judges of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as List

from pydantic import Field, NonNegativeFloat

from prefopt.api import Comparer, Judge, Pair, RewardSource, Rollout, Score, Scorer, Services, UserPath, Verdict


class GoldJudge(Judge):
    """A reward as a judge: P(a over b) = σ((r_a - r_b) / temperature)."""

    name = "gold"

    reward: RewardSource
    """What scores the replies."""
    temperature: NonNegativeFloat = 1.0
    """How much chance there is in a verdict; at 0 the higher score wins, and equal ones are a tie."""
    mistakes: float = Field(0.0, ge=0, le=0.5)
    """Share of pairs in which the worse side is called better, drawn by their text and the run's seed: at temperature 0
    a judge of accuracy 0.75 has 0.25."""

    def open(self, services: Services) -> Comparer:
        return scored(self.reward.open(services), self.temperature, self._slips(services))

    def open_rating(self, services: Services) -> Scorer:
        return self.reward.open(services)

    def _slips(self, services: Services) -> Callable[[Pair], bool]:
        def slips(pair: Pair) -> bool:
            texts = sorted((pair.a.text, pair.b.text))
            rng = services.rng("judge mistakes", repr(pair.prompt), *texts, pair.draw)
            return float(rng.random()) < self.mistakes

        return slips if self.mistakes else lambda pair: False


class RewardModelJudge(Judge):
    """A reward model that prefopt trained, as a judge: P(a over b) = σ((r_a - r_b) / temperature)."""

    name = "reward_model"

    path: UserPath
    """The folder of the model."""
    temperature: NonNegativeFloat = 1.0
    """What the difference of scores is divided by; at 0 the higher score wins."""

    def open(self, services: Services) -> Comparer:
        return scored(services.scorer(self.path), self.temperature)

    def open_rating(self, services: Services) -> Scorer:
        return services.scorer(self.path)


def scored(score: Scorer, temperature: float, slips: Callable[[Pair], bool] = lambda pair: False) -> Comparer:
    """A judge that prefers what scores higher; in pairs that `slips` names, what scores lower."""

    def compare(pairs: List[Pair]) -> list[Verdict]:
        groups = [Rollout(prompt=p.prompt, index=i, extra=p.extra, completions=(p.a, p.b)) for i, p in enumerate(pairs)]
        found = [_verdict(a, b, temperature) for a, b in score(groups)]
        return [v.turned() if slips(pair) else v for v, pair in zip(found, pairs, strict=True)]

    return compare


def _verdict(a: Score, b: Score, temperature: float) -> Verdict:
    if a.value is None or b.value is None:
        return Verdict(None, reason=a.reason if a.value is None else b.reason)
    gap = a.value - b.value
    if temperature > 0:
        return Verdict((1 + math.tanh(gap / temperature / 2)) / 2)
    return Verdict(float(gap > 0), tie=float(gap == 0))
