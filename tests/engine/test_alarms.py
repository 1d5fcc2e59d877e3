"""Alarms against series made by hand, and n-gram statistics against counts by hand."""

from __future__ import annotations

from math import inf, nan

import pytest

from prefopt.engine.alarms import ALARMS, Alarms, completion_metrics, distinct


def after(name, *values):
    alarms = Alarms()
    for step, value in enumerate(values, 1):
        alarms.observe(step, {name: value, "loss/total": 1e9 * step})
    return alarms.verdict()


@pytest.mark.parametrize(
    ("name", "quiet", "loud", "said"),
    [
        ("completion/tokens", 199.0, 210.0, "length is 2.1 times its start (limit 2)"),
        ("completion/tokens", 51.0, 40.0, "length is 0.4 times its start (limit 0.5)"),
        ("completion/repetition", 100.19, 100.3, "repetition rose by 0.3 (limit 0.2)"),
        ("completion/distinct_3", 81.0, 70.0, "distinct-3 is 0.7 times its start (limit 0.8)"),
        ("reward/ensemble/disagreement", 199.0, 300.0, "disagreement of the ensemble is 3 times its start (limit 2)"),
        ("kl/sequence", 119.0, 130.0, "KL divergence in nats rose by 30 (limit 20)"),
        ("completion/base_perplexity", 149.0, 160.0, "perplexity under the base is 1.6 times its start (limit 1.5)"),
    ],
)
def test_an_alarm_rings_beyond_its_limit_and_not_before(name, quiet, loud, said):
    start = [100.0] * 5
    title = next(alarm.title for alarm in ALARMS if name.endswith(alarm.ends))
    assert after(name, *start, *[quiet] * 10) == f"reward hacking: no sign of it in {title}"
    wanted = f"reward hacking: {said}, first at step 8. Read the samples before you trust the reward"
    assert after(name, *start, *[loud] * 10) == wanted


def test_one_odd_step_and_numbers_that_are_not_finite_ring_nothing():
    quiet = "reward hacking: no sign of it in length"
    assert after("completion/tokens", *[10.0] * 5, 1000.0, inf, 1000.0, nan, *[10.0] * 5) == quiet


def test_what_rang_once_stays_in_the_verdict_with_its_worst_value():
    series = [10.0] * 5 + [25.0] * 5 + [40.0] * 5 + [10.0] * 10
    assert "length is 4 times its start (limit 2), first at step 8" in after("completion/tokens", *series)


def test_what_began_at_zero_has_grown_without_bound():
    assert "is inf times its start" in after("reward/disagreement", *[0.0] * 5, *[0.1] * 5)


def test_a_run_that_measured_nothing_says_so():
    assert Alarms().verdict() == "reward hacking: nothing was measured that could show it"


def test_all_that_rang_is_in_one_line():
    alarms = Alarms()
    for step in range(20):
        alarms.observe(step, {"completion/tokens": 10.0 + 10 * step, "completion/distinct_3": 1 / (1 + step)})
    assert "\n" not in alarms.verdict()
    assert "length is" in alarms.verdict()
    assert "distinct-3 is" in alarms.verdict()


def test_statistics_of_completions():
    found = completion_metrics([(1, 2, 3, 1, 2, 3), (1, 2, 3, 4), (5,)])
    assert found == {
        "completion/tokens": pytest.approx(11 / 3),
        "completion/repetition": pytest.approx((1 / 4 + 0) / 2),
        "completion/distinct_3": pytest.approx(4 / 6),
    }
    assert completion_metrics([(1, 2)]) == {"completion/tokens": 2.0}
    assert completion_metrics([]) == {}


def test_distinct_counts_each_n_gram_once():
    assert distinct(["a", "b", "a", "b", "a"], 2) == 2 / 4
    assert distinct([], 1) is None
