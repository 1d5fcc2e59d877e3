"""What is particular to ORPO: a likelihood of the whole sequence."""

from __future__ import annotations

import pytest
from prefopt_orpo.pairs import ORPO

from prefopt.api import Comparison, Completion, DataError, Message, Role
from prefopt.testing.engine import trial


def test_the_prompt_is_scored_as_well_once_for_each_pair():
    row = Comparison(prompt="Say:", chosen=Completion(" a"), rejected=Completion(" b"))
    arranged = ORPO(nll="sequence").arrange([row, row])
    assert [(s.role, s.group) for s in arranged[4:]] == [(Role.OPENING, 0), (Role.OPENING, 1)]
    assert (arranged[4].prompt, arranged[4].completion.text, arranged[4].completion.finished) == ("", "Say:", False)


def test_a_conversation_is_not_scored_as_a_whole():
    talk = (Message("user", "Hi"),)
    row = Comparison(prompt=talk, chosen=Completion("a"), rejected=Completion("b"))
    with pytest.raises(DataError, match="never scored as a whole"):
        ORPO(nll="sequence").arrange([row])


@pytest.mark.parametrize("budget", [8192, 60])
def test_the_prompt_s_likelihood_joins_and_leaves_the_odds_alone(budget):
    """Its value is compared with TRL's in tests/golden."""
    both = trial(ORPO(nll="sequence"), token_budget=budget).metrics
    completion = trial(ORPO(), token_budget=budget).metrics
    odds = [m["loss/total"] - m["loss/nll"] for m in (both, completion)]
    assert odds[0] == pytest.approx(odds[1], abs=1e-5)
    assert abs(both["loss/nll"] - completion["loss/nll"]) > 1e-3
