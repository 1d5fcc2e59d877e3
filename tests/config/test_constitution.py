"""Constitutions: what may be written, and where errors are said to be."""

from __future__ import annotations

import pytest

from prefopt.config.constitution import read_constitution
from prefopt.errors import ConfigError

TEXT = """\
principles:
  - id: kind
    critique: Does it scold?
    revise: Take that out.
    compare: The better one does not scold.
  - id: short
    critique: Is it long?
    revise: Shorten it.
"""


def written(tmp_path, text=TEXT):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_principles_are_read_in_their_order(tmp_path):
    kind, short = read_constitution(written(tmp_path))
    assert (kind.id, kind.compare, short.revise, short.compare) == (
        "kind",
        "The better one does not scold.",
        "Shorten it.",
        None,
    )


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("critique: Is", "critque: Is", "7:5", r"unknown key `principles\.1\.critque`\n.*critique"),
        ("    revise: Shorten it.\n", "", "6:5", r"`principles\.1\.revise` is missing"),
        ("id: short", "id: kind", "6:5", "two principles are called `kind`"),
        ("revise: Shorten it.", "revise: ''", "8:5", r"`principles\.1\.revise`"),
        ("principles:", "principle:", "1:1", "unknown key `principle`"),
        (TEXT, "principles: []", "1:1", r"`principles`"),
        (TEXT, "- a", "1:1", "a configuration is a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, old, new, place, words):
    assert old in TEXT
    with pytest.raises(ConfigError, match=rf"c\.yaml:{place}: .*{words}"):
        read_constitution(written(tmp_path, TEXT.replace(old, new)))


def test_to_compare_every_principle_says_how(tmp_path):
    with pytest.raises(ConfigError, match=r"c\.yaml:6:\d+: principle `short` does not say how replies are compared"):
        read_constitution(written(tmp_path), compare=True)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read the file"):
        read_constitution(str(tmp_path / "nowhere.yaml"))
