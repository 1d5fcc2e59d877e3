from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from prefopt.api import (
    Comparison,
    Completion,
    ConfigError,
    DataError,
    Prompt,
    Ranking,
    RewardSource,
    Rollout,
    Row,
    Score,
)
from prefopt.bench.tasks import Divergence, GoldReward, Length, PreferenceAccuracy, RewardQuality, WinRate
from prefopt.data.adapt import adapt


class Letters(RewardSource):
    """The number of letters; `?` cannot be scored."""

    name = "letters"

    def score(self, groups):
        return [[_score(c.text) for c in group.completions] for group in groups]


def _score(text: str) -> Score:
    if text == "?":
        return Score(None, "it is a question")
    return Score(float(len(text)), parts={"a": float(text.count("a"))})


def rollout(*texts: str, prompt: str = "p") -> Rollout:
    return Rollout(prompt=prompt, completions=tuple(Completion(t, ids=tuple(range(len(t)))) for t in texts))


@dataclass
class Fixed:
    """A subject whose answers are given."""

    ours: list[Rollout] = field(default_factory=list)
    theirs: list[Rollout] = field(default_factory=list)
    ratios: list[list[float]] | None = None
    bound: float | None = None
    rows: Sequence[Row] = ()
    judged: list[list[float]] | None = None
    means: list[list[float | None]] | None = None

    def rollouts(self, n):
        assert all(len(group.completions) == n for group in self.ours)
        return self.ours

    def baseline(self, n):
        return self.theirs

    def log_ratios(self, rollouts):
        return self.ratios

    def mean_logps(self, rollouts):
        return self.means

    def kl_bound(self):
        return self.bound

    def scores(self, rollouts):
        return self.judged

    def reward(self, source):
        return source.score


OURS = [rollout("aa", "b"), rollout("", "aaaa")]
THEIRS = [rollout("a", "b"), rollout("cc", "cc")]


def test_gold_reward_and_its_parts():
    found = GoldReward(reward=Letters(), samples=2).evaluate(Fixed(OURS))
    assert found == {"gold_reward": (2 + 1 + 0 + 4) / 4, "gold_reward/a": 6 / 4}


def test_a_reply_that_cannot_be_scored_is_never_zero():
    with pytest.raises(ConfigError, match="could not be scored: it is a question"):
        GoldReward(reward=Letters()).evaluate(Fixed([rollout("?")]))


def test_win_rate_counts_ties_one_half_prompt_by_prompt():
    found = WinRate(reward=Letters(), samples=2).evaluate(Fixed(OURS, THEIRS))
    assert found == {"win_rate": (1 + 0.5 + 0 + 1) / 4}


def test_divergence_for_replies_and_tokens():
    found = Divergence(samples=2).evaluate(Fixed(OURS, ratios=[[0.5, -0.1], [0.2, 1.0]]))
    assert found == {"kl_sequence": pytest.approx(0.4), "kl_token": pytest.approx(1.6 / 7)}
    assert Divergence().evaluate(Fixed(bound=1.5)) == {"kl_sequence": 1.5}
    assert Divergence(samples=2).evaluate(Fixed(OURS)) == {}


def test_length():
    cut = [rollout("abc"), Rollout(prompt="p", completions=(Completion("a", ids=(1,), finished=False),))]
    assert Length().evaluate(Fixed(cut)) == {"length": 2.0, "finished": 0.5}


def pair(preference: float, chosen: str = "aa", rejected: str = "b") -> Comparison:
    return Comparison(prompt="p", chosen=Completion(chosen), rejected=Completion(rejected), preference=preference)


def test_reward_quality_by_hand():
    rows = [pair(1.0), pair(0.8, "a", "bb"), pair(0.5)]
    subject = Fixed(rows=rows, judged=[[2.0, 0.0], [0.0, 1.0], [0.3, 0.3]])
    found = RewardQuality(reward=Letters()).evaluate(subject)
    p = [1 / (1 + math.exp(-m)) for m in (2.0, -1.0, 0.0)]
    assert found["reward_accuracy"] == 0.5  # of the two pairs that are no ties
    assert found["reward_brier"] == pytest.approx(((p[0] - 1) ** 2 + (p[1] - 0.8) ** 2 + 0) / 3)
    assert found["gold_agreement"] == pytest.approx((1 + 1 + 0.5) / 3)  # gold prefers aa, bb, aa
    assert RewardQuality().evaluate(Fixed(rows=rows)) == {}


def test_without_a_better_side_in_any_pair_there_is_no_accuracy():
    subject = Fixed(rows=[pair(0.5), pair(0.5, "a", "b")], judged=[[1.0, 0.0], [0.0, 1.0]])
    found = RewardQuality(reward=Letters()).evaluate(subject)
    assert "reward_accuracy" not in found
    assert found["gold_agreement"] == 1.0  # gold prefers aa, and finds a and b equal
    assert "gold_agreement" not in RewardQuality(reward=Letters()).evaluate(
        Fixed(rows=subject.rows[1:], judged=[[1, 0]])
    )


def test_reward_quality_of_rankings_is_that_of_their_pairs():
    texts = ("aaa", "a", "aa")
    ranking = Ranking(prompt="p", completions=tuple(map(Completion, texts)), ranks=(0, 2, 1))
    pairs = adapt([ranking], Comparison)
    judged = [[float(len(p.chosen.text)), float(len(p.rejected.text))] for p in pairs]
    found = RewardQuality(reward=Letters()).evaluate(Fixed(rows=[ranking], judged=judged))
    assert found == RewardQuality(reward=Letters()).evaluate(Fixed(rows=pairs, judged=judged))
    assert (found["reward_accuracy"], found["gold_agreement"]) == (1.0, 1.0)


class Uneven(RewardSource):
    """Names a part of its score for some completions only."""

    name = "uneven"

    def score(self, groups):
        parts = [{"all": 1.0, "some": 2.0}, {"all": 3.0}]
        return [[Score(1.0, parts=parts[i]) for i, _ in enumerate(group.completions)] for group in groups]


def test_a_part_that_some_scores_do_not_have_is_left_out():
    found = GoldReward(reward=Uneven(), samples=2).evaluate(Fixed([rollout("a", "b")]))
    assert found == {"gold_reward": 1.0, "gold_reward/all": 2.0}


def test_reward_quality_needs_comparisons():
    with pytest.raises(ConfigError, match="needs held-out comparisons"):
        RewardQuality().evaluate(Fixed(rows=[Prompt(prompt="p")], judged=[]))


def test_preference_accuracy_is_the_share_of_pairs_with_the_likelier_token_on_the_chosen_side():
    means = [[-1.0, -2.0], [-3.0, -2.0], [-1.5, -1.5], [None, -1.0]]
    ratios = [[0.5, -0.5], [0.1, 0.0], [0.0, 2.0]]
    subject = Fixed(rows=[pair(1.0), pair(1.0), pair(0.9), pair(1.0)], means=means, ratios=ratios)
    assert PreferenceAccuracy().evaluate(subject) == {
        "preference_accuracy": pytest.approx(1.5 / 3),
        "implicit_accuracy": pytest.approx(2 / 3),
        "preference_pairs": 3.0,
    }


def test_preference_accuracy_leaves_out_ties_and_models_without_a_density():
    assert PreferenceAccuracy().evaluate(Fixed(rows=[pair(1.0)])) == {}
    with pytest.raises(ConfigError, match="needs held-out comparisons"):
        PreferenceAccuracy().evaluate(Fixed(rows=[pair(0.5)], means=[]))
    with pytest.raises(DataError, match="none of 1 held-out comparisons is short enough"):
        PreferenceAccuracy().evaluate(Fixed(rows=[pair(1.0)], means=[[None, -1.0]]))
