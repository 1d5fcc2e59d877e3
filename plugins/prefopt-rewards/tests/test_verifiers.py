"""Verifiers against answers known by hand."""

from __future__ import annotations

import json
import time

import pytest
from prefopt_rewards.numbers import last_number
from prefopt_rewards.shape import Length, Repetition
from prefopt_rewards.verifiers import ExactMatch, JSONSchema, NumericAnswer, Regex, last_block
from pydantic import ValidationError

from prefopt.api import Completion, ConfigError, Rollout


def score(reward, text, ids=None, **extra):
    """The score of one completion of row 5, or the reason it has none."""
    row = Rollout(prompt="p", index=5, completions=(Completion(text, ids=ids),), extra=extra)
    ((found,),) = reward.open(None)([row])
    return found.reason if found.value is None else found.value


def test_an_exact_match_forgives_white_space_and_what_it_was_told_to():
    assert score(ExactMatch(), " Paris\n", answer="Paris") == 1
    assert score(ExactMatch(), "Paris, of course", answer="Paris") == 0
    assert score(ExactMatch(), "paris.", answer="Paris") == 0
    assert score(ExactMatch(ignore_case=True, ignore_punctuation=True), "paris.", answer="Paris") == 1
    assert score(ExactMatch(column="right"), "b", right=["a", "b"]) == 1
    assert score(ExactMatch(), "42", answer=42) == 1
    assert score(ExactMatch(), "cafe\u0301", answer="caf\u00e9") == 1


def test_an_exact_match_can_begin_behind_a_marker():
    reward = ExactMatch(after="Answer:")
    assert score(reward, "Answer: no. Answer: yes", answer="yes") == 1
    assert score(reward, "yes", answer="yes") == 0


@pytest.mark.parametrize("reward", [ExactMatch(), NumericAnswer(), Regex(column="answer"), JSONSchema(column="answer")])
@pytest.mark.parametrize("extra", [{"other": 1}, {"answer": None}, {"answer": ""}])
def test_a_row_without_a_reference_has_no_score(reward, extra):
    reason = score(reward, "x", **extra)
    assert reason.startswith(f"{reward.name}, row 5, sample 0: the row has nothing in column `answer`")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The total is 1,234,567.50 dollars.", 1234567.5),
        ("$5 and then -$0.25", -0.25),
        ("x = -7", -7),
        ("x = \u22127", -7),
        ("7-3", 3),
        ("1.5e3", 1500),
        ("(-2)", -2),
        ("3/4", 0.75),
        (r"-\frac{3}{4}", -0.75),
        (r"\dfrac{1}{8} cm", 0.125),
        (r"10{,}000", 10000),
        (r"10\,000", 10000),
        ("2, 3 or 4", 4),
        ("2,3", 3),
        (".5", 0.5),
        ("42.", 42),
        ("5%", 5),
        ("version v2", None),
        ("1/0", None),
        ("1e9999", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize("text", ["9" * 200_000, "1," * 100_000, "-" * 200_000, "1e" * 100_000, "\\boxed{" * 30_000])
def test_hostile_texts_take_no_time(text):
    began = time.process_time()
    score(NumericAnswer(find="boxed"), text, answer=1)
    last_number(text)
    last_block(text)
    assert time.process_time() - began < 1


def test_a_numeric_answer_is_found_where_it_should_be():
    assert score(NumericAnswer(), "first 3, then 4", answer="4") == 1
    assert score(NumericAnswer(), "four", answer=4) == 0
    assert score(NumericAnswer(find="boxed"), r"so \boxed{\frac{1}{2}}, page 9", answer=0.5) == 1
    assert score(NumericAnswer(find="boxed"), "4", answer=4) == 0
    assert score(NumericAnswer(find="boxed"), r"\boxed{4", answer=4) == 0
    assert score(NumericAnswer(find="after"), "1 #### 72", answer="48 + 24 = 72 #### 72") == 1
    assert score(NumericAnswer(find="after", marker="A:"), "A: 72", answer=72) == 1
    assert "there is no number in column `answer`: 'four'" in score(NumericAnswer(), "4", answer="four")


def test_a_tolerance_is_absolute_below_one_and_relative_above():
    loose = NumericAnswer(tolerance=0.01)
    assert [score(loose, f"{x}", answer=0.5) for x in (0.509, 0.511)] == [1, 0]
    assert [score(loose, f"{x}", answer=200) for x in (201.9, 202.1)] == [1, 0]


def test_a_regular_expression_matches_a_part_or_the_whole():
    assert score(Regex(pattern=r"<b>.*</b>"), "so <b>x</b>") == 1
    assert score(Regex(pattern=r"<b>.*</b>", whole=True), "so <b>x</b>") == 0
    assert score(Regex(column="form"), "abc", form="^a.c$") == 1
    assert "row 5, sample 0: the pattern is wrong" in score(Regex(column="form"), "abc", form="(")


def test_a_pattern_that_backtracks_without_end_is_a_missing_score(monkeypatch):
    monkeypatch.setattr("prefopt_rewards.verifiers.PATTERN_SECONDS", 0.05)
    slow, text = r"^(a|a)+$", "a" * 40 + "b"
    assert "took longer than 0.05 s" in score(Regex(pattern=slow), text)
    schema = json.dumps({"pattern": slow})
    assert "took longer than 0.05 s" in score(JSONSchema(column="schema"), json.dumps(text), schema=schema)


PERSON = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer", "minimum": 0}}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"age": 3}', 1),
        ('{"age": -3}', 0),
        ('{"age": "3"}', 0),
        ("{}", 0),
        ('{"age": 3', 0),
        ('{"age": NaN}', 0),
        ('Here: {"age": 3}', 0),
        ('{"age": ' + "9" * 5000 + "}", 0),
    ],
)
def test_a_reply_fits_a_schema_or_does_not(text, value, tmp_path):
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    assert score(JSONSchema(path=str(tmp_path / "person.json")), text) == value
    assert score(JSONSchema(column="schema"), text, schema=PERSON) == value
    assert score(JSONSchema(column="schema"), text, schema=json.dumps(PERSON)) == value


def test_json_can_stand_in_the_last_code_block():
    reward = JSONSchema(column="schema", block=True)
    block = '```json\n{"age": 3}\n```'
    assert score(reward, f"```\n{{}}\n```\nor\n{block}\nas asked, `x`", schema=PERSON) == 1
    assert score(reward, f"{block}\n```\n{{}}\n```", schema=PERSON) == 0
    assert score(reward, '{"age": 3}', schema=PERSON) == 0


@pytest.mark.parametrize(
    ("schema", "text", "reason"),
    [
        ({"type": "nonsense"}, "{}", "the schema is wrong"),
        ("{", "{}", "the schema is no JSON"),
        ({"$ref": "https://example.com/schema.json"}, "{}", "refers to another, which is not fetched"),
        ({"$ref": "#"}, "{}", "nested too deeply"),
        ({}, "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_cannot_be_checked_is_a_missing_score(schema, text, reason):
    found = score(JSONSchema(column="schema"), text, schema=schema)
    assert found.startswith("json_schema, row 5, sample 0: ")
    assert reason in found


def test_a_file_without_a_schema_stops_the_run_at_its_start(tmp_path):
    (tmp_path / "bad.json").write_text('{"type": 3}')
    for name, reason in (("absent.json", "No such file"), ("bad.json", "the schema is wrong")):
        with pytest.raises(ConfigError, match=reason):
            JSONSchema(path=str(tmp_path / name)).open(None)


def test_the_right_length_earns_1_and_less_outside():
    words = Length(unit="words", minimum=2, maximum=3, margin=1)
    assert [score(words, "a " * n) for n in range(6)] == [0, 0.5, 1, 1, 0.5, 0]
    assert score(Length(maximum=2), "anything", ids=(1, 2)) == 1
    assert score(Length(maximum=2), "anything", ids=(1, 2, 3)) == 0
    assert score(Length(unit="characters", column="most"), "abcd", most=3) == 0
    assert "it has no tokens" in score(Length(maximum=2), "anything")


def test_repetition_is_minus_the_share_of_repeated_n_grams():
    assert score(Repetition(n=2), "a b a b a") == -2 / 4
    assert score(Repetition(n=3), "a b c d") == 0
    assert score(Repetition(n=3), "a b") == 0
    assert score(Repetition(n=1, unit="tokens"), "", ids=(7, 7, 7, 7)) == -3 / 4


@pytest.mark.parametrize(
    ("cls", "settings", "reason"),
    [
        (Regex, {}, "either `pattern` or `column`"),
        (Regex, {"pattern": "("}, "the pattern is wrong"),
        (JSONSchema, {"path": "a", "column": "b"}, "either `path` or `column`"),
        (Length, {}, "write `minimum`, `maximum` or `column`"),
        (Length, {"minimum": 3, "maximum": 2}, "`maximum` is below `minimum`"),
        (Length, {"maximum": 2, "column": "most"}, "either `maximum` or `column`"),
    ],
)
def test_settings_that_say_nothing_or_too_much_are_refused(cls, settings, reason):
    with pytest.raises(ValidationError, match=reason):
        cls(**settings)
