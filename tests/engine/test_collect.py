"""A step's replies: which are scored together, whose scores they get, and what is said of those it goes without."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from prefopt.batch import Draw
from prefopt.components import Score
from prefopt.config.models import RolloutConfig
from prefopt.engine.collect import Collector, _unused
from prefopt.engine.journal import Journal
from prefopt.errors import PluginError
from prefopt.rows import Completion, Rollout, Row

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


LENGTHS = {0: 9, 1: 3, 2: None, 3: 7, 4: 2, 5: 8, 6: 1, 7: 5}
"""When the replies to each row end; there is no room for the prompt of row 2."""


@dataclass
class Step:
    """A collector of one step over the rows above, two replies each: texts and scores are their row and place."""

    collector: Collector
    together: list[list[int]]
    """The rows that were scored together, call by call."""

    @classmethod
    def of(cls, folder, overlap, rank=0, world=1, keep=lambda group: True, times=lambda i: 1):
        together = []

        def drawer(requests):
            order = sorted(range(len(requests)), key=lambda i: (i % 2, LENGTHS[requests[i].prompt[0]]))
            return ((i, Completion(f"{requests[i].prompt[0]}.{i % 2}")) for i in order for _ in range(times(i)))

        def score(groups):
            together.append([group.index for group in groups])
            return [[Score(float(c.text)) for c in group.completions] for group in groups]

        collector = Collector(
            rows=[Row(prompt=str(i)) for i in LENGTHS],
            order=SimpleNamespace(rows=list(LENGTHS), step=lambda step: [5, 2, 0, 4, 1, 3]),
            renderer=SimpleNamespace(opening=lambda prompt: None if LENGTHS[int(prompt)] is None else (int(prompt),)),
            draws=(Draw(2),),
            drawer=lambda draw: drawer,
            score=score,
            keep=keep,
            settings=RolloutConfig(overlap=overlap),
            ranks=SimpleNamespace(rank=rank, world=world, gather=list),
            journal=Journal(folder, False),
            seed=0,
        )
        return cls(collector, together)

    def rows(self):
        """Those that came, in their order, each with the scores of its own replies."""
        rollouts = self.collector(0).rollouts
        for group in rollouts:
            assert [c.score for c in group.completions] == [float(f"{group.index}.{k}") for k in range(2)]
        return [group.index for group in rollouts]


@pytest.mark.parametrize(
    ("overlap", "together"),
    [(None, [[5, 0, 4, 1, 3]]), (1, [[4], [1], [3], [5], [0]]), (2, [[4, 1], [5, 3], [0]]), (9, [[5, 0, 4, 1, 3]])],
)
def test_replies_are_scored_as_they_end_and_stay_with_their_rows(tmp_path, overlap, together):
    step = Step.of(tmp_path, overlap)
    assert step.rows() == [5, 0, 4, 1, 3]
    assert step.together == together


@pytest.mark.parametrize(("rank", "rows", "together"), [(0, [5, 0, 1], [[5, 1], [0]]), (1, [4, 3], [[4, 3]])])
def test_a_rank_scores_its_share_as_it_ends(tmp_path, rank, rows, together):
    step = Step.of(tmp_path, 2, rank, world=2)
    assert step.rows() == rows
    assert step.together == together


def test_rows_in_place_of_refused_ones_are_scored_as_they_end(tmp_path):
    step = Step.of(tmp_path, 2, keep=lambda group: group.index not in (4, 5))
    rows = step.rows()
    assert rows[:3] == [0, 1, 3]
    assert sorted(rows[3:]) == [6, 7]
    assert step.together == [[4, 1], [5, 3], [0], rows[3:]]


@pytest.mark.parametrize("times", [0, 2])
def test_a_sampler_that_does_not_answer_each_request_once_is_told_so_before_anything_is_scored(tmp_path, times):
    step = Step.of(tmp_path, None, times=lambda i: times if i == 3 else 1)
    with pytest.raises(PluginError, match="did not give one completion for each request"):
        step.rows()
    assert step.together == []


@pytest.mark.parametrize("times", [0, 2])
def test_it_is_told_so_while_others_are_scored(tmp_path, times):
    with pytest.raises(PluginError, match="did not give one completion for each request"):
        Step.of(tmp_path, 2, times=lambda i: times if i == 3 else 1).rows()
