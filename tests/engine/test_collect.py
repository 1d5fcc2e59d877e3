"""What a step says of the replies that it goes without."""

from __future__ import annotations

import pytest

from prefopt.components import Score
from prefopt.engine.collect import _unused
from prefopt.rows import Completion, Rollout

DRAWN = Rollout(prompt="p", completions=tuple(map(Completion, "abc")))
SCORES = [Score(1.0), Score(None, "it hung"), Score(None)]


@pytest.mark.parametrize(
    ("usable", "kept", "reasons"),
    [
        (None, None, {"a": "another reply of its group has no score", "b": "it hung", "c": "no score"}),
        (DRAWN.select([0]), None, {"a": "its group was refused", "b": "it hung", "c": "no score"}),
        (DRAWN.select([0]), DRAWN.select([0]), {"b": "it hung", "c": "no score"}),
    ],
    ids=["left out", "refused", "without some"],
)
def test_every_reply_that_is_not_used_has_its_reason(usable, kept, reasons):
    unused = _unused(DRAWN, SCORES, usable, kept)
    assert unused is not None
    assert {c.text: reason for c, reason in zip(unused.group.completions, unused.reasons, strict=True)} == reasons
    assert [c.score for c in unused.group.completions] == [{"a": 1.0}.get(text) for text in reasons]


def test_a_group_that_is_used_whole_leaves_nothing():
    assert _unused(DRAWN, [Score(0.0)] * 3, DRAWN, DRAWN) is None
