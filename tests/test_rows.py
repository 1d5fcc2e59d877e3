from __future__ import annotations

import pytest

from prefopt.rows import Comparison, Completion, Demonstration, Judgement, Message, Ranking, Role, Rollout, show_text

A, B, C = Completion("a"), Completion("b"), Completion("c")


def test_each_kind_says_which_role_each_completion_plays():
    roles = {
        Role.DEMONSTRATION: Demonstration(prompt="p", completion=A),
        Role.DESIRABLE: Judgement(prompt="p", completion=A, desirable=True),
        Role.UNDESIRABLE: Judgement(prompt="p", completion=A, desirable=False),
        Role.SAMPLE: Rollout(prompt="p", completions=(A,)),
    }
    for role, row in roles.items():
        (sequence,) = row.sequences(4)
        assert (sequence.role, sequence.group, sequence.completion) == (role, 4, A)


def test_a_comparison_gives_chosen_then_rejected_with_its_numbers():
    row = Comparison(prompt="p", chosen=A, rejected=B, preference=0.8, margin=2, weight=3.0)
    chosen, rejected = row.sequences(0)
    assert (chosen.role, chosen.completion, rejected.role, rejected.completion) == (Role.CHOSEN, A, Role.REJECTED, B)
    assert chosen.fields == rejected.fields == {"preference": 0.8, "margin": 2.0}
    assert chosen.weight == 3.0


def test_an_absent_number_is_absent_and_not_zero():
    assert "margin" not in Comparison(prompt="p", chosen=A, rejected=B).sequences(0)[0].fields
    assert Rollout(prompt="p", completions=(A,)).sequences(0)[0].fields == {"finished": 1.0}


def test_an_upright_comparison_has_the_preferred_side_as_chosen():
    row = Comparison(prompt="p", chosen=A, rejected=B, preference=0.2, margin=-1.5, votes=(1, 4, 2)).upright()
    assert (row.chosen, row.rejected, row.preference, row.margin, row.votes) == (B, A, 0.8, 1.5, (4, 1, 2))
    assert row.upright() is row


def test_a_ranking_gives_its_completions_best_first():
    row = Ranking(prompt="p", completions=(A, B, C), ranks=(2, 0, 0))
    assert [(s.completion, s.fields["rank"]) for s in row.sequences(0)] == [(B, 0), (C, 0), (A, 2)]


def test_scores_are_put_on_the_completions_of_a_rollout():
    row = Rollout(prompt="p", completions=(A, B)).scored([1.5, None])
    assert [c.score for c in row.completions] == [1.5, None]
    with pytest.raises(ValueError, match="shorter"):
        row.scored([1.0])


def test_prompts_are_shown_as_a_person_reads_them():
    assert show_text("hello") == "hello"
    assert show_text((Message("user", "hi"), Message("assistant", "yes"))) == "user: hi\nassistant: yes"
