from __future__ import annotations

import pytest

from prefopt.data.check import Policy, screened
from prefopt.data.read import Listed
from prefopt.data.source import rows_of
from prefopt.errors import DataError
from prefopt.rows import Comparison, Completion, Demonstration, Judgement, Message, Prompt, Ranking

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def rows(*data: dict, **settings) -> list:
    return list(screened(rows_of(Listed("f", len(data), data.__getitem__), **settings), Policy())[0])


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
    assert [c.score for c in row.completions] == [0.5, 2, 0.5]
    assert row.ranks == (1, 0, 1)


BAD = [
    ({**PAIR, "prompt": 3}, "prompt", "must be text or a list of messages, not int 3"),
    ({**PAIR, "chosen": None}, "chosen", "must be text, not NoneType None"),
    ({**PAIR, "chosen": "a\0"}, "chosen", "holds a NUL character at character 1"),
    ({**PAIR, "rejected": "c"}, "rejected", "is the same text as the chosen side"),
    ({**PAIR, "chosen": TALK[1:]}, "chosen", "is a list of messages, but the prompt is text"),
    ({**PAIR, "prompt": TALK}, "prompt", "must not end with an assistant message"),
    ({**PAIR, "margin": 10**400}, "margin", "must be a finite number"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0]", "has the unknown role 'judge'"),
    ({"messages": [*TALK[:1], {**TALK[1], "tool_calls": [{}]}]}, "messages[1]", "has tool calls"),
    ({"messages": [*TALK[:1], {**TALK[1], "loss_weight": 0.5}]}, "messages[1]", "has loss_weight float 0.5"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0]", "content that is not text"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "conversations[0]", "is from 'tool'"),
    ({"instruction": "i", "output": "o", "history": ["x"]}, "history", "must be a list of pairs"),
    ({"prompt": "p", "completions": ["a", "b"], "votes": [[0]]}, "votes[0]", "list of 2 numbers"),
    ({"chosen": "Ja", "rejected": "Nein"}, "chosen", "the two share no prompt"),
    ({"chosen": TALK, "rejected": [{"role": "user", "content": "yo"}, TALK[1]]}, "chosen", "behind the 0 that both"),
    ({"prompt": "p", "a": "x", "b": "y", "label": 1}, "label", "must be one of a, b, tie"),
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
    assert problem.where == f"f, row 0, field `{field}`"
    assert what in problem.what


def test_every_bad_row_is_reported():
    with pytest.raises(DataError) as caught:
        rows(PAIR, {**PAIR, "chosen": 1}, {"prompt": "p"}, {**PAIR, "margin": "x"})
    assert [p.where for p in caught.value.problems] == [
        "f, row 1, field `chosen`",
        "f, row 2",
        "f, row 3, field `margin`",
    ]
    assert "unlike the first row, which is preference" in caught.value.problems[1].what


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(DataError, match="no format fits a record with fields `question`, `answer`") as caught:
        rows({"question": "q", "answer": "a"})
    assert "chosen, prompt, rejected (preference)" in caught.value.problems[0].fix


# --- formats that others invented -----------------------------------------------------------------------------------

USER, YES, NO = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no")))
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}
ASKED = (Message("user", "hi"),)
PAIR_OF_TURNS = Comparison(prompt=ASKED, chosen=Completion("yes"), rejected=Completion("no"))
DEMONSTRATED = Demonstration(prompt=ASKED, completion=Completion("yes"))


@pytest.mark.parametrize(
    ("data", "row"),
    [
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, PAIR_OF_TURNS),
        ({"chosen_messages": [USER, YES], "rejected_messages": [USER, NO]}, PAIR_OF_TURNS),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "no"}}, PAIR_OF_TURNS),
        ({"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no"}, PAIR_OF_TURNS),
        ({"conversations": [HUMAN, GPT]}, DEMONSTRATED),
        ({"instruction": "hi", "output": "yes"}, DEMONSTRATED),
        ({"messages": [USER, {**YES, "content": [{"type": "text", "text": "y"}, {"type": "text", "value": "es"}]}]},
         DEMONSTRATED),
        ({"conversations": [HUMAN, GPT], "kto_tag": False},
         Judgement(prompt=ASKED, completion=Completion("yes"), desirable=False)),
        ({"messages": [USER, YES], "label": True},
         Judgement(prompt=ASKED, completion=Completion("yes"), desirable=True)),
        ({"text": "once upon"}, Demonstration(prompt="", completion=Completion("once upon"))),
        ({"instruction": "hi", "completions": [{"response": "yes", "overall_score": 2},
                                               {"response": "no", "overall_score": 7.5}]},
         Ranking(prompt=ASKED, completions=(Completion("yes", score=2), Completion("no", score=7.5)), ranks=(1, 0))),
    ],
)  # fmt: skip
def test_what_a_format_means(data, row):
    assert rows(data) == [row]


def test_ultrafeedback_in_pairs_has_its_margin_and_its_prompt_is_checked():
    data = {"prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 8, "score_rejected": 6.5}
    (row,) = rows(data)
    assert (row.prompt, row.margin, row.chosen.text) == (ASKED, 1.5, "yes")
    with pytest.raises(DataError, match="is not what the user asks last"):
        rows({**data, "prompt": "ho"})


def test_a_system_prompt_and_a_history_come_first():
    (row,) = rows({"instruction": "c", "input": "d", "output": "e", "system": "s", "history": [["a", "b"]]})
    assert [(m.role, m.content) for m in row.prompt] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c\nd"),
    ]
    (row,) = rows({"conversations": [HUMAN, GPT], "system": "s"})
    assert row.prompt[0] == Message("system", "s")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: why? A: because", "Q: why? A: dunno", "Q: why? A:"),
        ("Is it an apple", "Is it an apricot", "Is it an"),
        ("Is it?yes", "Is it?no", "Is it?"),
        ("line\nab", "line\nac", "line\n"),
        ("hello", "hello world", "hello"),
    ],
)
def test_an_implicit_prompt_ends_where_the_first_differing_word_begins(chosen, rejected, prompt):
    (row,) = rows({"chosen": chosen, "rejected": rejected})
    assert (row.prompt, row.prompt + row.chosen.text, row.prompt + row.rejected.text) == (prompt, chosen, rejected)


def test_a_dialogue_is_cut_behind_the_last_shared_turn():
    start = "\n\nHuman: hi\n\nAssistant:"
    (row,) = rows({"chosen": start + " yes", "rejected": start + " yesterday"})
    assert (row.prompt, row.chosen.text, row.rejected.text) == (start, " yes", " yesterday")
    parted = start + " a\n\nHuman: b\n\nAssistant: c"
    (row,) = rows({"chosen": parted, "rejected": start + " d"})
    assert (row.prompt, row.chosen.text) == (start, " a\n\nHuman: b\n\nAssistant: c")


def test_two_conversations_that_part_early_are_refused():
    longer = [USER, NO, USER, YES]
    with pytest.raises(DataError, match="has 3 messages behind the 1 that both share"):
        rows({"chosen": longer, "rejected": [USER, YES]})


def test_raters_become_a_soft_label_and_votes():
    data = {"prompt": "p", "a": "x", "b": "y"}
    (row,) = rows({**data, "raters": ["b", "b", "tie", "a"]})
    assert (row.chosen.text, row.preference, row.votes) == ("y", 0.625, (2, 1, 1))
    assert rows({**data, "label": "tie"})[0].preference == 0.5
    assert rows({**data, "label": "b"})[0].chosen.text == "y"


def test_each_rater_s_ranks_are_kept_and_their_mean_is_the_rank():
    (row,) = rows({"prompt": "p", "completions": ["x", "y", "z"], "votes": [[0, 1, 2], [2, 0, 1]]})
    assert (row.votes, row.ranks) == (((0, 1, 2), (2, 0, 1)), (1, 0, 2))
