"""Who works by principles in the `replies` world: what they do, how often they fail, and what they never look at."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import prefopt
from prefopt.api import Completion, Draft, Pair, Principle
from prefopt.bench.worlds.replies import annotators, gold
from prefopt.bench.worlds.replies.assistants import PrincipledAssistant, PrincipledJudge
from prefopt.bench.worlds.replies.language import read_request
from prefopt.bench.worlds.replies.principles import RULES, mended
from prefopt.bench.worlds.replies.writers import write_reply, write_request
from prefopt.config.constitution import read_constitution
from prefopt.engine.services import EngineServices

UPSET = "Customer: I liked order 1242. Please cancel order 1009. I am not happy.\nShop:"
CALM = "Customer: Please cancel order 1009.\nShop:"


def revised(prompt, reply, name, skill=1.0, key="k"):
    principle = Principle(id=name, critique="c", revise="r")
    (found,) = PrincipledAssistant(skill=skill).open(EngineServices(0))([Draft(prompt, reply, principle, key)])
    return found


@pytest.mark.parametrize(
    ("prompt", "name", "before", "after"),
    [
        (CALM, "answer", " Hello! We cannot stop order 1009.", " Hello! Order 1009 is cancelled."),
        (CALM, "answer", " We need some more time. Have a nice day!", " Order 1009 is cancelled. Have a nice day!"),
        (CALM, "answer", " We have stopped order 1009. We cannot stop order 1009.", " We have stopped order 1009."),
        (CALM, "answer", " Hello! Have a nice day!", " Hello! Order 1009 is cancelled. Have a nice day!"),
        (UPSET, "order", " We have stopped order 1242.", " We have stopped order 1009."),
        (CALM, "manners", " We have stopped order 1009.", " Hello! We have stopped order 1009. Have a nice day!"),
        (
            UPSET,
            "manners",
            " Kind regards, your shop team. We have stopped order 1009.",
            " Hello! We are sorry for the trouble. We have stopped order 1009. Kind regards, your shop team.",
        ),
        (CALM, "brevity", " We are sorry for the trouble. Hello! We are a leading shop.", " Hello!"),
        (
            UPSET,
            "brevity",
            " We are sorry for the trouble. You are absolutely right!",
            " We are sorry for the trouble.",
        ),
        (CALM, "kindness", " Hello! You should know this.", " Hello!"),
    ],
)
def test_each_principle_takes_away_what_is_against_it(prompt, name, before, after):
    found = revised(prompt, before, name)
    assert (found.reply, found.critique.startswith("To be changed: ")) == (after, True)
    again = revised(prompt, after, name)
    assert (again.reply, again.critique) == (after, "Nothing is to be changed.")


def test_all_principles_together_make_any_reply_perfect():
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompt = write_request(rng)
        request = read_request(prompt)
        reply = write_reply(request, rng)
        for name in ("kindness", "brevity", "answer", "order", "manners"):
            reply = mended(RULES[name], request, reply)
        assert sum(gold.value_parts(request, reply).values()) == gold.MAXIMUM


def test_it_fails_as_often_as_it_says():
    draws = 2000
    kept = sum(
        revised(CALM, " You should know this. Hello!", "kindness", 0.7, str(i)).reply != " Hello!" for i in range(draws)
    )
    assert abs(kept / draws - 0.3) < 4 * math.sqrt(0.3 * 0.7 / draws)


def test_nobody_who_works_by_principles_looks_at_gold(monkeypatch):
    monkeypatch.setattr(gold, "value_parts", lambda *_: pytest.fail("gold was looked at"))
    monkeypatch.setattr(annotators, "value_parts", lambda *_: pytest.fail("gold was looked at"))
    assert revised(CALM, " You should know this. Hello!", "kindness").reply == " Hello!"
    folder = Path(prefopt.__file__).parent / "bench/worlds/replies"
    assert not any("gold" in (folder / name).read_text() for name in ("principles.py", "assistants.py"))


def test_a_principle_nobody_taught_and_a_reply_of_nothing_are_missing():
    assert "no principle `honesty` is known" in revised(CALM, " Hello!", "honesty").reason
    assert revised(CALM, " We value every customer.", "brevity").reason == "nothing is left of a reply"


def judged(principle, a, b, mistakes=0.0, draw=0):
    drawn = Principle(id=principle, critique="c", revise="r") if principle else {"id": "kindness"}
    pair = Pair(CALM, Completion(a), Completion(b), {"principle": drawn}, draw)
    (verdict,) = PrincipledJudge(mistakes=mistakes).open(EngineServices(0))([pair])
    return verdict


def test_the_judge_knows_the_principle_and_nothing_else():
    rude, short = " Hello! We have stopped order 1009. You should know this.", " Hello!"
    assert judged("kindness", short, rude).value == 1.0
    assert judged("kindness", rude, short).value == 0.0
    assert judged("answer", rude, short).value == 1.0
    assert judged("order", rude, short).value == 0.5
    assert "no principle was drawn" in judged(None, rude, short).reason
    wrong = sum(judged("kindness", short, rude, 0.2, draw).value == 0.0 for draw in range(2000))
    assert abs(wrong / 2000 - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 2000)


def test_the_constitution_of_the_recipe_is_known():
    path = Path(prefopt.__file__).parent / "recipes/cai/constitution.yaml"
    assert {principle.id for principle in read_constitution(str(path), compare=True)} == set(RULES)
