"""Rows by index: one format for a file, columns under other names, labels under other values."""

from __future__ import annotations

import pytest

from prefopt.data.check import Policy, screened
from prefopt.data.read import Cell, Listed
from prefopt.data.source import rows_of, verdict
from prefopt.errors import DataError
from prefopt.rows import Comparison, Completion, Demonstration
from prefopt.testing.tiny import write_rows

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def source(*data, **settings):
    return rows_of(Listed("f", len(data), data.__getitem__), **settings)


def test_rows_are_made_when_they_are_asked_for():
    asked = []
    rows = rows_of(Listed("f", 1000, lambda i: asked.append(i) or {"prompt": str(i)}))
    asked.clear()
    assert (rows[700].prompt, rows[-1].prompt, rows[700].index) == ("700", "999", 700)
    assert asked == [700, 999, 700]
    with pytest.raises(IndexError):
        rows[1000]


def test_the_verdict_says_what_rows_were_taken_for():
    talk = [{"role": "user", "content": "why"}]
    answers = [[*talk, {"role": "assistant", "content": c}] for c in "ab"]
    assert str(source(PAIR)) == "preference, plain text: comparison rows"
    found = str(source({"chosen": answers[0], "rejected": answers[1]}))
    assert found == (
        "preference_implicit, conversations, implicit prompt: comparison rows; the first prompt ends 'user: why'"
    )
    assert verdict([Demonstration(prompt="", completion=Completion("x"))]) == "demonstration rows"


def test_a_bad_first_row_does_not_decide_the_format():
    rows = source({"nonsense": 1}, PAIR)
    assert rows[1].chosen.text == "c"
    with pytest.raises(DataError, match="fields `nonsense`, unlike the first row, which is preference"):
        rows[0]


def test_text_and_conversations_do_not_mix():
    talk = {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}
    with pytest.raises(DataError, match="is unlike the first rows, which are plain text"):
        source({"prompt": "p", "completion": "c"}, talk)[1]


def test_columns_under_other_names():
    data = {"q": "why", "context": "Rome", "best": {"text": ["because"]}, "worst": "dunno", "id": 7}
    columns = {"prompt": ("context", "q"), "chosen": "best.text.0", "rejected": "worst"}
    (row,) = source(data, columns=columns)
    assert (row.prompt, row.chosen.text, row.rejected.text) == ("Rome\nwhy", "because", "dunno")
    assert row.extra == {"best": {"text": ["because"]}, "id": 7}


def test_a_column_that_is_missing_is_named_with_the_nearest():
    with pytest.raises(DataError, match="`qestion`.*is missing") as caught:
        source({"question": "x"}, columns={"prompt": "qestion"})
    assert caught.value.problems[0].fix == "Did you mean `question`?"


def test_labels_under_other_values():
    columns = {"prompt": "q", "a": "x", "b": "y", "raters": ("r1", "r2", "r3")}
    labels = {"a": 1, "b": 2, "tie": 0}
    (row,) = source({"q": "?", "x": "X", "y": "Y", "r1": 2, "r2": 2, "r3": 0}, columns=columns, labels=labels)
    assert (row.chosen.text, row.votes, row.preference) == ("Y", (2, 0, 1), pytest.approx(5 / 6))
    with pytest.raises(DataError, match="is bool True, which data.labels does not name"):
        source({"q": "?", "x": "X", "y": "Y", "r1": True, "r2": 2, "r3": 0}, columns=columns, labels=labels)[0]
    judged = {"desirable": "good", "undesirable": ("bad", "worse")}
    rows = source(*({"prompt": "p", "completion": "c", "label": v} for v in ("worse", "good")), labels=judged)
    assert [row.desirable for row in rows] == [False, True]


def test_a_named_format_is_not_recognised_but_required():
    data = {"prompt": "p", "completion": "c", "label": "x"}
    (row,) = source(data, form="prompt_completion")
    assert type(row) is Demonstration
    assert row.extra == {"label": "x"}
    with pytest.raises(DataError, match="unlike the first row, which is ranking"):
        source(data, form="ranking")[0]


def test_cells_of_a_csv_file_are_text_and_numbers_only_where_a_number_is_wanted():
    data = {k: Cell(v) for k, v in {**PAIR, "prompt": "42", "margin": "0.5", "weight": "", "votes": ""}.items()}
    del data["votes"]
    (row,) = source(data)
    assert (row.prompt, row.margin, row.weight) == ("42", 0.5, 1.0)
    assert type(row.prompt) is str
    with pytest.raises(DataError, match="must be a finite number, not str 'x'"):
        source({**data, "margin": Cell("x")})[0]


def test_bad_rows_stop_or_are_left_out_up_to_a_cap():
    rows = source(PAIR, {**PAIR, "chosen": 1}, *[PAIR] * 18)
    with pytest.raises(DataError, match="f, row 1, field `chosen`: must be text"):
        screened(rows, Policy())
    kept, rejects = screened(rows, Policy(drop=True, most=0.05))
    assert [kept[i].index for i in (0, 1, 18)] == [0, 2, 19]
    assert len(kept) == 19
    assert [(r.index, r.sort) for r in rejects] == [(1, "not text")]
    with pytest.raises(DataError, match="1 of 20 rows are bad, and data.max_bad_rows allows 4.0% of them"):
        screened(rows, Policy(drop=True, most=0.04))
    bad = source(PAIR, *[{**PAIR, "chosen": None}] * 3)
    assert len(screened(bad, Policy(drop=True, most=3))[1]) == 3
    with pytest.raises(DataError, match="3 of 4 rows are bad, and data.max_bad_rows allows 2"):
        screened(bad, Policy(drop=True, most=2))


def test_rows_that_are_all_bad_are_never_all_dropped():
    rows = source({"prompt": 1}, {"prompt": 2})
    with pytest.raises(DataError, match="2 of 2 rows are bad"):
        screened(rows, Policy(drop=True, most=10))


def test_rows_a_source_has_made_are_taken_as_they_are():
    made = [Comparison(prompt="p", chosen=Completion("a"), rejected=Completion("b"))]
    assert screened(made, Policy()) == (made, [])


def test_a_part_of_a_file_keeps_its_lines(tmp_path, plugins):
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": f"p{i}"} for i in range(10)])
    part = plugins.find("data source", "jsonl").model_validate({"path": str(path), "start": 7, "stop": 9}).rows()
    assert [(row.prompt, row.index, part.where(row.index)) for row in part] == [
        ("p7", 0, f"{path}:8"),
        ("p8", 1, f"{path}:9"),
    ]
    with pytest.raises(DataError, match="there are 10 rows, and none from 10 on"):
        plugins.find("data source", "jsonl").model_validate({"path": str(path), "start": 10}).rows()
    with pytest.raises(ValueError, match="`stop` must be greater than `start`"):
        plugins.find("data source", "jsonl").model_validate({"path": str(path), "start": 3, "stop": 3})
