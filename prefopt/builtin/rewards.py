"""The core's own reward sources."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Literal

from prefopt.api import (
    Comparer,
    Completion,
    Judge,
    Pair,
    Pairing,
    RewardSource,
    Rollout,
    Score,
    Scorer,
    Services,
    UserPath,
    Verdict,
    answered,
    both_orders,
    places,
    win_rates,
)


class TrainedReward(RewardSource):
    """The score of a reward model that prefopt trained."""

    name = "reward_model"

    path: UserPath
    """The folder of the model."""

    def open(self, services: Services) -> Scorer:
        return services.scorer(self.path)


class JudgeReward(RewardSource):
    """What a judge says: how often each reply wins against others to the same prompt, or the judge's rating of it."""

    name = "judge"

    judge: Judge
    """Who judges."""
    by: Literal["comparing", "rating"] = "comparing"
    """Whether replies are compared, or rated one by one under the judge's rubric."""
    pairing: Pairing = "all"
    """Which replies of a prompt are compared: every two, each with the next one around a ring, or each with the row's
    reference."""
    both_orders: bool = True
    """Whether each pair is judged in both orders, where a disagreement is a tie."""
    reference: str = "reference"
    """The column with the reference, with `pairing: against_reference`."""

    def open(self, services: Services) -> Scorer:
        if self.by == "rating":
            return self.judge.open_rating(services)
        compare = self.judge.open(services)
        asked = both_orders(compare) if self.both_orders else compare
        return lambda groups: self._won(asked, groups)

    def _won(self, compare: Comparer, groups: List[Rollout]) -> list[list[Score]]:
        """All groups are judged at once."""
        replies = [self._replies(group) for group in groups]
        met = [places(len(g.completions), self.pairing) if own else [] for g, own in zip(groups, replies, strict=True)]
        pairs = [
            Pair(group.prompt, own[i], own[j], group.extra)
            for group, own, meetings in zip(groups, replies, met, strict=True)
            for i, j in meetings
        ]
        verdicts = iter(answered(compare, pairs))
        return [self._scores(group, own, [next(verdicts) for _ in own]) for group, own in zip(groups, met, strict=True)]

    def _replies(self, group: Rollout) -> tuple[Completion, ...]:
        """The replies, and the reference behind them where one is wanted; none where the row has no reference."""
        if self.pairing != "against_reference":
            return group.completions
        text = group.extra.get(self.reference)
        return (*group.completions, Completion(text)) if isinstance(text, str) else ()

    def _scores(self, group: Rollout, met: List[tuple[int, int]], verdicts: List[Verdict]) -> list[Score]:
        alone = "there is nothing to compare it with"
        absent = f"the row has no text in column `{self.reference}`" if self.pairing == "against_reference" else alone
        why = next((v.reason for v in verdicts if v.value is None), absent)
        rates = win_rates(len(group.completions), met, verdicts)
        return [Score(rate, "" if rate is not None else f"judge, row {group.index}: {why}") for rate in rates]
