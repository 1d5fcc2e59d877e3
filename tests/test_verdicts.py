"""Verdicts: what disagreement, nonsense and missing ones become, and which pairs are asked about."""

from __future__ import annotations

from itertools import product
from math import comb, inf, nan

import pytest

from prefopt.api import Completion, Pair, PluginError, Verdict, agreed, answered, both_orders, places, win_rates
from prefopt.verdicts import questions


def pair(a="aa", b="b"):
    return Pair("p", Completion(a), Completion(b))


def longer(pairs):
    return [Verdict(float(len(p.a.text) > len(p.b.text))) for p in pairs]


def test_a_judge_that_reads_both_replies_says_the_same_in_both_orders():
    (verdict,) = both_orders(longer)([pair()])
    assert (verdict.a_better, verdict.tie, verdict.votes) == (1.0, 0.0, (2, 0, 0))
    (verdict,) = both_orders(longer)([pair("b", "aa")])
    assert (verdict.a_better, verdict.votes) == (0.0, (0, 2, 0))


@pytest.mark.parametrize("first", [1.0, 0.9, 0.51])
def test_a_judge_that_always_says_the_first_ends_in_ties(first):
    (verdict,) = both_orders(lambda pairs: [Verdict(first) for _ in pairs])([pair()])
    assert (verdict.a_better, verdict.tie, verdict.value, verdict.votes) == (0.0, 1.0, 0.5, (1, 1, 0))


def test_probabilities_of_both_orders_are_averaged():
    verdict = agreed(Verdict(0.7, tie=0.1), Verdict(0.9))
    assert (verdict.a_better, verdict.tie) == (pytest.approx(0.8), pytest.approx(0.05))


def test_what_is_missing_in_one_order_is_missing_and_is_never_turned_into_a_number():
    """A judge once returned -1 for what it could not read, which turned became 1 - (-1) = 2."""
    for broken in (Verdict(None, reason="cut"), Verdict(-1.0), Verdict(2.0), Verdict(nan), Verdict(0.7, tie=0.5)):
        for verdicts in product((broken, Verdict(1.0)), repeat=2):
            if broken in verdicts:
                found = both_orders(lambda pairs, given=verdicts: list(given))([pair()])[0]
                assert found.a_better is None
                assert found.reason
    assert answered(lambda pairs: [Verdict(inf)], [pair()])[0].reason.endswith("is no probability")


def test_a_judge_that_loses_verdicts_is_an_error():
    with pytest.raises(PluginError, match="1 verdicts for 2 pairs"):
        both_orders(lambda pairs: [Verdict(1.0)])([pair()])


def test_usage_and_votes_add_up_over_orders():
    found = agreed(Verdict(0.9, usage={"calls": 1}), Verdict(0.8, usage={"calls": 1, "tokens_in": 7}))
    assert found.usage == {"calls": 2, "tokens_in": 7}
    assert Verdict(0.2, votes=(1, 4, 0)).turned().votes == (4, 1, 0)


@pytest.mark.parametrize("n", range(2, 9))
def test_pairings_ask_what_they_promise(n):
    assert len(places(n, "all")) == comb(n, 2)
    assert len(places(n, "ring")) == (n if n > 2 else 1)
    assert places(n, "against_reference") == [(i, n) for i in range(n)]
    for pairing in ("all", "ring"):
        met = [i for meeting in places(n, pairing) for i in meeting]
        assert len({met.count(i) for i in range(n)}) == 1
    assert questions([n, n], "ring") == 2 * 2 * len(places(n, "ring"))


def test_win_rates_of_a_total_order_are_its_places():
    met = places(4, "all")
    verdicts = longer([pair("a" * (i + 1), "a" * (j + 1)) for i, j in met])
    assert win_rates(4, met, verdicts) == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert win_rates(1, places(1, "all"), []) == [None]
    assert win_rates(2, places(2, "against_reference"), [Verdict(0.5, tie=0.5), Verdict(None)]) == [0.75, None]
