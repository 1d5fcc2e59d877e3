from __future__ import annotations

import pytest

from prefopt.data.formats import to_rows
from prefopt.data.read import Record
from prefopt.errors import DataError
from prefopt.rows import Comparison, Demonstration, Judgement, Message, Prompt, Ranking

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def rows(*data: dict) -> list:
    return to_rows([Record(f"f:{i + 1}", d) for i, d in enumerate(data)])


def test_the_kind_follows_from_the_fields():
    kinds = {
        Comparison: PAIR,
        Ranking: {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 0]},
        Judgement: {"prompt": "p", "completion": "c", "label": True},
        Demonstration: {"prompt": "p", "completion": "c"},
        Prompt: {"prompt": "p"},
    }
    for kind, data in kinds.items():
        assert type(rows(data)[0]) is kind
    (row,) = rows({"messages": TALK})
    assert (row.prompt, row.completion.text) == ((Message("user", "hi"),), "yes")


def test_a_comparison_with_its_numbers():
    (row,) = rows({**PAIR, "preference": 0.7, "margin": 2, "weight": 0.5, "topic": "x"})
    assert (row.preference, row.margin, row.weight, row.extra) == (0.7, 2.0, 0.5, {"topic": "x"})
    assert rows(PAIR)[0].preference == 1.0


def test_votes_give_the_preference_and_the_less_liked_side_is_turned_round():
    (row,) = rows({**PAIR, "votes": [1, 4, 1]})
    assert (row.chosen.text, row.preference, row.votes) == ("r", 0.75, (4, 1, 1))
    assert rows({**PAIR, "votes": [2, 2]})[0].preference == 0.5


def test_conversations():
    (row,) = rows({"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [{"role": "assistant", "content": "no"}]})
    assert (row.prompt, row.chosen.text, row.rejected.text) == ((Message("user", "hi"),), "yes", "no")


def test_scores_become_ranks_and_equal_ones_tie():
    (row,) = rows({"prompt": "p", "completions": ["a", "b", "c"], "scores": [0.5, 2, 0.5]})
    assert row.ranks == (1, 0, 1)


BAD = [
    ({**PAIR, "prompt": 3}, "prompt", "must be text or a list of messages, not int 3"),
    ({**PAIR, "chosen": None}, "chosen", "must be text, not NoneType None"),
    ({**PAIR, "chosen": "\ud800"}, "chosen", "is not valid Unicode"),
    ({**PAIR, "preference": 1.5}, "preference", "must be between 0 and 1, not 1.5"),
    ({**PAIR, "preference": True}, "preference", "must be a finite number"),
    ({**PAIR, "margin": float("nan")}, "margin", "must be a finite number"),
    ({**PAIR, "votes": [0, 0]}, "votes", "must count the raters"),
    ({**PAIR, "votes": [1, -1]}, "votes", "must count the raters"),
    ({**PAIR, "weight": -1}, "weight", "must be between 0 and inf"),
    ({**PAIR, "chosen": TALK}, "chosen", "must be one assistant message"),
    ({**PAIR, "prompt": [{"role": "user"}]}, "prompt[0]", "text in `role` and `content`"),
    ({**PAIR, "prompt": []}, "prompt", "at least one"),
    ({"prompt": "p", "completions": ["a"], "ranks": [0]}, "completions", "at least two"),
    ({"prompt": "p", "completions": ["a", "b"]}, "ranks", "needs `ranks`"),
    ({"prompt": "p", "completions": ["a", "b"], "ranks": [0]}, "ranks", "list of 2 numbers"),
    ({"prompt": "p", "completions": ["a", "b"], "ranks": [0, None]}, "ranks", "must not hold null"),
    ({"prompt": "p", "completion": "c", "label": 1}, "label", "must be true or false, not int 1"),
    ({"messages": TALK[:1]}, "messages", "must end with an assistant message"),
    ({"messages": "x"}, "messages", "must be a list of messages"),
]


@pytest.mark.parametrize(("data", "field", "what"), BAD)
def test_a_bad_field_is_named_with_its_line(data, field, what):
    with pytest.raises(DataError) as caught:
        rows(data)
    (problem,) = caught.value.problems
    assert problem.where == f"f:1, field `{field}`"
    assert what in problem.what


def test_every_bad_row_is_reported():
    with pytest.raises(DataError) as caught:
        rows(PAIR, {**PAIR, "chosen": 1}, {"prompt": "p"}, {**PAIR, "margin": "x"})
    assert [p.where for p in caught.value.problems] == ["f:2, field `chosen`", "f:3", "f:4, field `margin`"]
    assert "unlike the first row, which is a comparison" in caught.value.problems[1].what


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(DataError, match="fields `question`, `answer`") as caught:
        rows({"question": "q", "answer": "a"})
    assert "chosen, prompt, rejected (comparison)" in caught.value.problems[0].fix
