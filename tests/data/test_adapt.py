from __future__ import annotations

from dataclasses import replace

import pytest

from prefopt.data.adapt import ADAPTERS, adapt, adaptable
from prefopt.errors import DataError
from prefopt.rows import Comparison, Completion, Demonstration, Judgement, Prompt, Ranking, Rollout

A, B, C = (Completion(x, ids=(i, 9)) for i, x in enumerate("abc"))
SHARED = {"prompt": "p", "index": 5, "weight": 2.0, "extra": {"k": 1}}
PAIR = Comparison(**SHARED, chosen=A, rejected=B, preference=0.8)
TIE = Comparison(**SHARED, chosen=A, rejected=B, preference=0.5)
RANKING = Ranking(**SHARED, completions=(A, B, C), ranks=(1, 0, 1))


def scored(*scores: float | None) -> Rollout:
    return Rollout(**SHARED, completions=(A, B, C)).scored(scores)


def test_every_adapter_keeps_the_row_s_place_prompt_weight_and_extras():
    rows = {Comparison: PAIR, Ranking: RANKING, Rollout: scored(1, 2, 3)}
    rows[Judgement] = Judgement(**SHARED, completion=A, desirable=True)
    rows[Demonstration] = Demonstration(**SHARED, completion=A)
    for source, target in ADAPTERS:
        for row in adapt([rows[source]], target):
            assert type(row) is target
            assert (row.prompt, row.index, row.weight, row.extra) == ("p", 5, 2.0, {"k": 1})


def test_sampled_tokens_survive():
    assert adapt([PAIR], Demonstration)[0].completion.ids == (0, 9)
    assert adapt([scored(1, 2, 3)], Comparison)[0].chosen.ids == (2, 9)


def test_comparisons():
    assert [(j.completion, j.desirable) for j in adapt([PAIR], Judgement)] == [(A, True), (B, False)]
    assert adapt([TIE], Judgement) == adapt([TIE], Demonstration) == []


def test_a_ranking_becomes_all_its_pairs():
    found = [(c.chosen.text, c.rejected.text, c.preference) for c in adapt([RANKING], Comparison)]
    assert found == [("b", "a", 1.0), ("a", "c", 0.5), ("b", "c", 1.0)]


def test_scores_of_a_ranking_become_margins():
    scored_ones = tuple(replace(c, score=s) for c, s in zip((A, B, C), (2.0, 5.0, None), strict=True))
    pairs = adapt([Ranking(**SHARED, completions=scored_ones, ranks=(1, 0, 1))], Comparison)
    assert [(p.chosen.text, p.rejected.text, p.margin) for p in pairs][:2] == [("b", "a", 3.0), ("a", "c", None)]


def test_votes_of_a_ranking_become_preferences():
    row = Ranking(prompt="p", completions=(A, B), ranks=(0, 1), votes=((0, 1), (1, 0), (1, 0), (0, 0)))
    (pair,) = adapt([row], Comparison)
    assert (pair.chosen, pair.preference, pair.votes) == (B, 0.625, (2, 1, 1))


def test_a_ranking_becomes_judgements_around_its_mean_place():
    row = Ranking(prompt="p", completions=(A, B, C), ranks=(0, 1, 2))
    assert [(j.completion, j.desirable) for j in adapt([row], Judgement)] == [(A, True), (C, False)]
    assert adapt([row], Demonstration)[0].completion == A


def test_rollouts():
    (pair,) = adapt([scored(0.5, None, 2)], Comparison)
    assert (pair.chosen.text, pair.rejected.text) == ("c", "a")
    assert adapt([scored(1, 1, None)], Comparison) == []  # equal scores say nothing
    assert adapt([scored(None, None, 1)], Ranking) == []
    (ranking,) = adapt([scored(1, 3, 1)], Ranking)
    assert ([c.text for c in ranking.completions], ranking.ranks) == (["b", "a", "c"], (0, 1, 1))
    assert [(j.completion.text, j.desirable) for j in adapt([scored(1, 3, 2)], Judgement)] == [
        ("b", True),
        ("a", False),
    ]
    assert adapt([scored(1, 3, 2)], Demonstration)[0].completion.text == "b"
    assert adapt([scored(None, None, None)], Demonstration) == adapt([scored(None, None, None)], Judgement) == []


def test_judgements():
    good, bad = (Judgement(prompt="p", completion=A, desirable=d) for d in (True, False))
    assert [d.completion for d in adapt([good, bad], Demonstration)] == [A]


def test_where_no_way_leads_is_said():
    assert not adaptable(Prompt, Comparison)
    assert adaptable(Ranking, Comparison)
    with pytest.raises(DataError, match="a prompt cannot become a comparison"):
        adapt([Prompt(prompt="p")], Comparison)
    with pytest.raises(DataError) as caught:
        adapt([Demonstration(prompt="p", completion=A)], Ranking)
    assert caught.value.problems[0].fix == "It can become: prompt."
