from __future__ import annotations

import pytest

from prefopt import errors
from prefopt.errors import EXIT_CODES, ConfigError, PrefoptError, Problem, did_you_mean, redact


def test_a_problem_reads_where_what_and_what_to_do():
    assert str(Problem("unknown key", "run.yaml:3:5", "Did you mean `lr`?")) == (
        "run.yaml:3:5: unknown key\n    Did you mean `lr`?"
    )


def test_an_error_carries_every_problem():
    error = ConfigError("one", Problem("two", "here"), where="there", fix="mend it")
    assert [p.what for p in error.problems] == ["one", "two"]
    assert str(error) == "there: one\n    mend it\nhere: two"


def test_every_kind_of_error_has_a_documented_exit_code():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, PrefoptError)]
    assert {kind.exit_code for kind in kinds} | {0} == set(EXIT_CODES)


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("bta", ["beta", "lr"], "Did you mean `beta`?"),
        ("Beta", ["beta", "lr"], "Did you mean `beta`?"),
        ("zzz", ["beta", "lr"], "Known: beta, lr."),
        ("zzz", [], "None is known here."),
    ],
)
def test_suggestions(name, known, expected):
    assert did_you_mean(name, known) == expected


SECRETS = ["hf_" + "a1" * 12, "sk-" + "Zz9_" * 6, "ghp_" + "A1b2" * 7]


@pytest.mark.parametrize("secret", SECRETS)
def test_known_secrets_are_redacted_anywhere(secret):
    shown = redact({"a": [f"x {secret} y", {"b": secret}], secret: 1})
    assert secret not in repr(shown)
    assert repr(shown).count("[redacted]") == 3


def test_values_of_secret_variables_are_redacted(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain-looking-words")
    assert redact("see plain-looking-words here") == "see [redacted] here"


def test_keys_that_name_secrets_are_redacted_and_counts_of_tokens_are_not():
    data = {"api_key": "abc", "password": "x", "auth_token": "y", "key": "env:HF_TOKEN"}
    assert redact(data) == dict.fromkeys(("api_key", "password", "auth_token"), "[redacted]") | {"key": "env:HF_TOKEN"}
    kept = {"token_budget": "5", "max_new_tokens": "7", "completion/tokens": "9", "api_key": "env:MINE"}
    assert redact(kept) == kept


def test_secret_keys_are_named_by_whole_words():
    secret = ("token", "hf_token", "auth_token", "my_access_token", "openai_api_key", "db_password", "client_secret")
    assert set(redact(dict.fromkeys(secret, "x")).values()) == {"[redacted]"}
    plain = dict.fromkeys(("stop_token", "pad_token", "eos_token", "token_budget", "tokenizer", "secretary"), "###")
    assert redact(plain) == plain


def test_a_variable_that_names_a_file_or_a_tokenizer_is_no_secret(monkeypatch):
    monkeypatch.setenv("MY_TOKEN_FILE", "/run/tokens/mine")
    monkeypatch.setenv("TOKENIZERS_CACHE", "some/folder")
    assert redact("/run/tokens/mine some/folder") == "/run/tokens/mine some/folder"


def test_redaction_keeps_types():
    data = {"a": (1, 2.5, None, True), "b": ["x"]}
    assert redact(data) == data
    assert isinstance(redact(data)["a"], tuple)
