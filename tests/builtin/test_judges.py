"""The core's judges, and a judge as a reward."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prefopt.api import (
    Completion,
    ConfigError,
    Judge,
    Pair,
    PluginError,
    RewardSource,
    Rollout,
    Score,
    ServiceError,
    Verdict,
)
from prefopt.bench.tasks import WinRate
from prefopt.builtin.judges import GoldJudge, RewardModelJudge
from prefopt.builtin.rewards import JudgeReward
from prefopt.config import ModelConfig
from prefopt.data.render import load_tokenizer
from prefopt.engine.models import load_classifier
from prefopt.engine.services import EngineServices

SERVICES = EngineServices(0)


class Length(RewardSource):
    """The number of letters; `?` cannot be scored."""

    name = "length_of_text"

    def score(self, groups):
        return [[_score(c.text) for c in group.completions] for group in groups]


def _score(text):
    return Score(None, "it is a question") if text == "?" else Score(float(len(text)))


class First(Judge):
    """Prefers what it is shown first, and counts what it is asked."""

    name = "first_shown"

    def open(self, services):
        def compare(pairs):
            self.asked.append(len(pairs))
            return [Verdict(1.0) for _ in pairs]

        object.__setattr__(self, "asked", [])
        return compare


def pair(a, b, draw=0):
    return Pair("p", Completion(a), Completion(b), draw=draw)


def group(*texts, **extra):
    return Rollout(prompt="p", index=3, completions=tuple(map(Completion, texts)), extra=extra)


def scores(reward, *groups):
    return [[s.value for s in own] for own in reward.open(SERVICES)(groups)]


def test_gold_is_the_sigmoid_of_the_difference():
    judge = GoldJudge(reward=Length(), temperature=2.0).open(SERVICES)
    (verdict,) = judge([pair("aaaa", "a")])
    assert verdict.a_better == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert verdict.tie == 0.0


def test_gold_at_temperature_zero_is_a_step():
    judge = GoldJudge(reward=Length(), temperature=0.0).open(SERVICES)
    found = judge([pair("aa", "a"), pair("a", "aa"), pair("b", "a"), pair("?", "a")])
    assert [(v.a_better, v.tie) for v in found] == [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (None, 0.0)]
    assert found[3].reason == "it is a question"


@pytest.mark.parametrize("accuracy", [0.6, 0.75, 0.9])
def test_gold_makes_its_share_of_mistakes_whatever_the_order(accuracy):
    pairs = [pair("a" * (i + 2), "a" * (i + 1)) for i in range(2000)]
    judge = GoldJudge(reward=Length(), temperature=0.0, mistakes=round(1 - accuracy, 2)).open(SERVICES)
    right = [v.a_better for v in judge(pairs)]
    assert sum(right) / 2000 == pytest.approx(accuracy, abs=4 * math.sqrt(0.25 / 2000))
    assert [1 - v.a_better for v in judge([p.turned() for p in pairs])] == right


def test_a_judge_as_a_reward_is_the_win_rate_in_the_group():
    reward = JudgeReward(judge=GoldJudge(reward=Length(), temperature=0.0))
    assert scores(reward, group("a", "aaa", "aa"), group("b", "b")) == [[0.0, 1.0, 0.5], [0.5, 0.5]]


def test_a_judge_as_a_reward_asks_once_for_all_groups_in_both_orders():
    judge = First()
    assert scores(JudgeReward(judge=judge), group("a", "b", "c"), group("d", "e")) == [[0.5] * 3, [0.5] * 2]
    assert judge.asked == [2 * (3 + 1)]
    one = First()
    assert scores(JudgeReward(judge=one, pairing="ring", both_orders=False), group("a", "b", "c", "d")) == [[0.5] * 4]
    assert one.asked == [4]


def test_a_reply_nobody_compared_has_no_score():
    reward = JudgeReward(judge=GoldJudge(reward=Length()))
    (found,) = reward.open(SERVICES)([group("?", "a")])
    assert [s.value for s in found] == [None, None]
    assert found[0].reason == "judge, row 3: it is a question"
    assert "nothing to compare it with" in reward.open(SERVICES)([group("a")])[0][0].reason


def test_replies_are_compared_with_the_reference_of_their_row():
    reward = JudgeReward(judge=GoldJudge(reward=Length(), temperature=0.0), pairing="against_reference")
    found = reward.open(SERVICES)([group("a", "aaa", reference="aa"), group("a")])
    assert [s.value for s in found[0]] == [0.0, 1.0]
    assert found[1][0].value is None
    assert "no text in column `reference`" in found[1][0].reason


def test_a_judge_that_rates_is_a_reward_and_one_that_does_not_says_so():
    assert scores(JudgeReward(judge=GoldJudge(reward=Length()), by="rating"), group("a", "aa")) == [[1.0, 2.0]]
    with pytest.raises(PluginError, match="compares replies and does not rate"):
        scores(JudgeReward(judge=First(), by="rating"), group("a"))


TEXTS = ("1 2 3", "7", "4 4 4 4")


@pytest.fixture
def classifier(tiny_model, tmp_path) -> tuple[str, dict[str, float]]:
    """A folder with a reward model, and its scores of `TEXTS` behind the prompt `p`, read with transformers alone."""
    folder, tokenizer = str(tmp_path / "reward"), load_tokenizer(str(tiny_model))
    load_classifier(ModelConfig(path=str(tiny_model)), tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = {}
    for text in TEXTS:
        ids = tokenizer("p" + text + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found[text] = network(ids).logits.item()
    return folder, found


def test_a_reward_model_s_verdict_is_the_sigmoid_of_the_difference(classifier):
    path, score = classifier
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    verdicts = RewardModelJudge(path=path, temperature=0.5).open(SERVICES)([pair(a, b) for a, b in pairs])
    expected = [1 / (1 + math.exp(-(score[a] - score[b]) / 0.5)) for a, b in pairs]
    assert [v.a_better for v in verdicts] == pytest.approx(expected, abs=1e-5)
    assert [v.tie for v in verdicts] == [0.0] * 9
    assert min(abs(p - 0.5) for p, (a, b) in zip(expected, pairs, strict=True) if a != b) > 0.01


def test_a_reward_model_at_temperature_zero_prefers_the_higher_score_and_rates_by_it(classifier):
    path, score = classifier
    judge = RewardModelJudge(path=path, temperature=0.0)
    low, _, high = sorted(TEXTS, key=score.__getitem__)
    found = judge.open(SERVICES)([pair(high, low), pair(low, high), pair(low, low)])
    assert [(v.a_better, v.tie) for v in found] == [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0)]
    (rated,) = judge.open_rating(SERVICES)([group(*TEXTS)])
    assert [s.value for s in rated] == pytest.approx([score[text] for text in TEXTS], abs=1e-5)


def test_a_reward_model_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no reward model at `nowhere`"):
        RewardModelJudge(path="nowhere").open(SERVICES)


class Drawn:
    """A subject with given replies."""

    def rollouts(self, n):
        return [group("aaa"), group("a")]

    def baseline(self, n):
        return [group("aa"), group("?")]

    def judge(self, judge):
        return judge.open(SERVICES)


def test_win_rate_by_a_judge_never_counts_a_missing_verdict():
    assert WinRate(judge=First()).evaluate(Drawn()) == {"win_rate": 0.5}
    with pytest.raises(ServiceError, match="1 of 2 pairs have no verdict, the first one: it is a question"):
        WinRate(judge=GoldJudge(reward=Length())).evaluate(Drawn())
    with pytest.raises(ValueError, match="either `reward` or `judge`"):
        WinRate()


def test_judges_are_named_in_configurations(run_config):
    run = run_config(
        "prefopt: 1\nmodel: {path: m}\ndata: {source: replies, format: prompts}\nalgorithm: {name: grpo}\n"
        "reward:\n  name: judge\n  pairing: ring\n"
        "  judge: {name: gold, reward: {name: replies_gold}, temperature: 0}\nrun: {dir: runs/x}\n"
    )
    assert run.reward.judge.reward.name == "replies_gold"
