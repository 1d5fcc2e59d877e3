"""Judges without a server: rules, panels, recorded verdicts, and a model on this machine."""

from __future__ import annotations

import json
import math

import pytest
from prefopt_judges.local import Local
from prefopt_judges.panel import Ensemble, Majority
from prefopt_judges.replay import Replay
from prefopt_judges.rules import Rule

from prefopt.api import Completion, ConfigError, DataError, Judge, Message, Pair, Rollout, Verdict


def pair(a="aa", b="b", prompt="p"):
    return Pair(prompt, Completion(a), Completion(b))


def verdicts(judge, *pairs):
    return [(v.a_better, v.tie) for v in judge.open(None)(pairs)]


class Says(Judge):
    """Says what it is told to say."""

    name = "says"
    a_better: float | None
    tie: float = 0.0

    def compare(self, pairs):
        return [Verdict(self.a_better, self.tie, "it is silent", usage={"calls": 1.0}) for _ in pairs]


@pytest.mark.parametrize(
    ("prefer", "expected"),
    [("longer", 1.0), ("shorter", 0.0), ("first", 1.0), ("second", 0.0)],
)
def test_rules_do_what_they_say(prefer, expected):
    assert verdicts(Rule(prefer=prefer), pair()) == [(expected, 0.0)]
    assert verdicts(Rule(prefer=prefer, confidence=0.75), pair()) == [(0.25 + expected / 2, 0.0)]


def test_a_rule_that_says_nothing_is_a_tie():
    assert verdicts(Rule(prefer="longer"), pair("a", "b")) == [(0.0, 1.0)]
    assert verdicts(Rule(prefer="neither"), pair()) == [(0.0, 1.0)]
    contains = Rule(prefer="contains", text="Please")
    assert verdicts(contains, pair("yes, please", "yes"), pair("no", "yes")) == [(1.0, 0.0), (0.0, 1.0)]
    with pytest.raises(ValueError, match="belong together"):
        Rule(prefer="contains")


def test_a_planted_position_bias_hits_its_share_of_pairs():
    pairs = [pair("a" * i, "a" * (i + 1)) for i in range(1, 2001)]
    found = verdicts(Rule(prefer="longer", first=0.3), *pairs)
    assert sum(a for a, _ in found) / 2000 == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 2000))
    blind = [p for p, (a, _) in zip(pairs, found, strict=True) if a == 1.0]
    assert verdicts(Rule(prefer="longer", first=0.3), *(p.turned() for p in blind)) == [(1.0, 0.0)] * len(blind)


def test_an_ensemble_is_the_mean_and_a_majority_the_vote():
    members = (Says(a_better=0.9), Says(a_better=0.8), Says(a_better=0.1))
    assert verdicts(Ensemble(members=members), pair()) == [(pytest.approx(0.6), 0.0)]
    (vote,) = Majority(members=members).open(None)([pair()])
    assert (vote.a_better, vote.votes, vote.usage) == (1.0, (2, 1, 0), {"calls": 3.0})
    assert verdicts(Majority(members=members[1:]), pair()) == [(0.0, 1.0)]
    assert verdicts(Majority(members=(Says(a_better=0.0, tie=1.0), Says(a_better=0.1))), pair()) == [(0.0, 0.0)]


def test_a_missing_member_is_never_a_number():
    members = (Says(a_better=0.9), Says(a_better=None), Says(a_better=None))
    (mean,), (vote,) = (panel(members=members).open(None)([pair()]) for panel in (Ensemble, Majority))
    assert (mean.a_better, vote.a_better) == (None, None)
    assert mean.reason == "a member of the ensemble is missing: it is silent"
    assert vote.reason == "1 of 3 judges voted: it is silent"
    assert verdicts(Majority(members=members, quorum=1), pair()) == [(1.0, 0.0)]


RECORDS = [
    {"q": "one", "extra": "x", "left": "a", "right": "b", "said": {"plain": "1", "turned": ["1"]}},
    {"q": "two", "extra": "", "left": "c", "right": "d", "said": {"plain": "1", "turned": ["2"]}},
    {"q": "three", "extra": "", "left": "e", "right": "f", "said": {"plain": "Tie", "turned": ["garbage"]}},
]
COLUMNS = {"prompt": ["q", "extra"], "a": "left", "b": "right", "verdict": "said.plain"}
LABELS = {"a": "1", "b": ["2", 2], "tie": "Tie"}


@pytest.mark.parametrize("lines", [True, False])
def test_recorded_verdicts_are_found_by_their_texts_in_any_order(lines, tmp_path):
    path = tmp_path / "verdicts"
    path.write_text("\n".join(map(json.dumps, RECORDS)) if lines else json.dumps(RECORDS))
    judge = Replay(path=str(path), columns=COLUMNS, labels=LABELS).open(None)
    asked = [pair("a", "b", "one\nx"), pair("b", "a", "one\nx"), pair("e", "f", "three"), pair("a", "b", "one")]
    found = judge(asked)
    assert [(v.a_better, v.tie) for v in found] == [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (None, 0.0)]
    assert found[3].reason == "no verdict was recorded for this pair"


def test_verdicts_recorded_in_both_orders_keep_them_apart(tmp_path):
    path = tmp_path / "verdicts.json"
    path.write_text(json.dumps(RECORDS))
    judge = Replay(path=str(path), columns={**COLUMNS, "swapped": "said.turned.0"}, labels=LABELS).open(None)
    first, second = judge([pair("c", "d", "two"), pair("d", "c", "two")])
    assert (first.a_better, second.a_better) == (1.0, 1.0)  # in both orders what was shown first
    third = judge([pair("f", "e", "three")])[0]
    assert third.a_better is None
    assert "'garbage', which is none" in third.reason


def test_verdicts_and_texts_may_stand_in_two_files(tmp_path):
    texts, path = tmp_path / "texts.json", tmp_path / "verdicts.json"
    texts.write_text(json.dumps([{"idx": 7, "prompt": "p", "a": "x", "b": "y"}]))
    path.write_text(json.dumps([{"idx": 7, "verdict": "b"}]))
    judge = Replay(path=str(path), texts=str(texts)).open(None)
    assert judge([pair("x", "y")])[0].a_better == 0.0
    with pytest.raises(DataError, match="does not have the columns named"):
        Replay(path=str(path)).open(None)
    with pytest.raises(DataError, match="cannot be read"):
        Replay(path=str(tmp_path / "nothing")).open(None)


class Model:
    """A text model whose log-probabilities follow from what is asked; it counts questions."""

    identity = "model-1"

    def __init__(self, chat=False):
        self.chat, self.asked = chat, []

    def logps(self, prompts, endings):
        self.asked += prompts
        if any("long" in str(prompt) for prompt in prompts):
            raise DataError("the question has 999 tokens, more than the 128 the model can read")
        return [[-1.0 - i for i in range(len(endings))] for _ in prompts]


class Services:
    def __init__(self, model, folder):
        self.model, self.folder = model, folder

    def language_model(self, path):
        return self.model

    def kept(self, name):
        return self.folder / name


def test_a_local_model_answers_by_its_log_probabilities_and_remembers_them(tmp_path):
    model = Model()
    judge = Local(path="m", canaries=0, ties=True)
    weights = [math.exp(-1 - i) for i in range(3)]
    for asked, usage in ((1, {"calls": 1.0}), (1, {"cached": 1.0})):
        (verdict,) = judge.open(Services(model, tmp_path))([pair("yes", "no")])
        assert verdict.a_better == pytest.approx(weights[0] / sum(weights))
        assert verdict.tie == pytest.approx(weights[2] / sum(weights))
        assert (len(model.asked), verdict.usage) == (asked, usage)
    assert model.asked[0].endswith("Answer with one letter: A, or B, or C when neither is.\nAnswer:")


def test_a_chat_model_is_asked_through_its_template_and_only_then(tmp_path):
    model = Model(chat=True)
    Local(path="m", canaries=0).open(Services(model, tmp_path))([pair("yes", "no")])
    assert [type(m) for m in model.asked[0]] == [Message, Message]
    with pytest.raises(ConfigError, match="has no chat template"):
        Local(path="m", template="chat").open(Services(Model(), tmp_path))


def test_a_pair_that_is_too_long_is_missing_and_the_others_are_not(tmp_path):
    found = Local(path="m", canaries=0).open(Services(Model(), tmp_path))([pair("yes", "no"), pair("long", "no")])
    assert found[0].a_better is not None
    assert found[1].a_better is None
    assert "more than the 128 the model can read" in found[1].reason


def test_a_local_model_rates_too(tmp_path):
    score = Local(path="m").open_rating(Services(Model(), tmp_path))
    weights = [math.exp(-i) for i in range(5)]
    ((found,),) = score([Rollout(prompt="p", completions=(Completion("fine"),))])
    assert found.value == pytest.approx(sum(w * (i + 1) for i, w in enumerate(weights)) / sum(weights))
