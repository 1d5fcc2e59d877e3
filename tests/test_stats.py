from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from prefopt.stats import best_of_n_kl, calibration_error, t_interval


def test_student_t_equals_scipy():
    values = [1.2, 0.7, 2.5, 1.9]
    found = t_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_the_interval_covers_what_it_says_at_three_seeds():
    rng = np.random.default_rng(0)
    covered = sum(i.low <= 0 <= i.high for i in (t_interval(list(rng.normal(size=3))) for _ in range(2000)))
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0]])
def test_fewer_than_three_seeds_have_no_interval(values):
    found = t_interval(values)
    assert (found.mean, found.low, found.high) == (sum(values) / len(values), None, None)


def test_calibration_error_by_hand():
    predicted, observed = [0.05, 0.15, 0.18, 0.95, 1.0], [0, 0, 1, 1, 1]
    expected = (0.05 + abs(0.33 - 1) + abs(1.95 - 2)) / 5
    assert calibration_error(predicted, observed) == pytest.approx(expected)


def test_a_calibrated_forecast_has_no_error():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20_000)
    y = (rng.uniform(size=20_000) < p).astype(float)
    assert calibration_error(list(p), list(y)) < 0.02
    assert calibration_error(list(np.clip(p * 2, 0, 1)), list(y)) > 0.1


def test_best_of_n_bound_holds_for_an_exact_distribution():
    """Four outcomes with distinct rewards: the law of the best of n is known, and so is its divergence."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    for n in (1, 2, 4, 16):
        cumulative = np.cumsum(p)
        best = cumulative**n - (cumulative - p) ** n
        exact = float((best * np.log(best / p)).sum())
        assert exact <= best_of_n_kl(n) + 1e-12
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(8) == pytest.approx(math.log(8) - 7 / 8)
