"""From verdicts on replies of several systems to win rates, with and without the influence of length, and a ranking.
Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np

from prefopt.stats import Interval

RIDGE, STEPS, RESAMPLES = 1e-3, 25, 200


@dataclass(frozen=True, slots=True)
class Meeting:
    """System `a` against system `b` on a prompt: P(a's reply is better), and how much longer it is, in characters."""

    prompt: int
    a: int
    b: int
    value: float
    longer: float


def fitted(design: np.ndarray, values: np.ndarray, weights: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """The coefficients of a logistic regression on probabilities, by Newton's method. `design` [n, k], `values` [n]
    from 0 to 1, `ridge` [k] keeps what the data leaves open finite."""
    found = np.zeros(design.shape[1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ found, -30, 30)))
        slope = design.T @ (weights * (values - p)) - ridge * found
        curve = (design * (weights * p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(curve, slope)
        found += step
        if np.abs(step).max() < 1e-6:
            break
    return found


def strengths(meetings: List[Meeting], systems: int, weights: np.ndarray) -> np.ndarray:
    """The strength of each system in log-odds, their mean 0. Bradley & Terry 1952; a tie is half a win."""
    design = np.zeros((len(meetings), systems))
    for i, meeting in enumerate(meetings):
        design[i, meeting.a], design[i, meeting.b] = 1.0, -1.0
    values = np.array([meeting.value for meeting in meetings])
    found = fitted(design, values, weights, np.full(systems, RIDGE))
    return np.asarray(found - found.mean())


def controlled(meetings: List[Meeting], weights: np.ndarray) -> float:
    """The win rate of `a` if its replies were as long as those of `b`: a logistic regression on the difference in
    length, through tanh and in units of its spread, read off at no difference.

    After Dubois et al. 2024, arXiv:2404.04475; without their term for how hard each prompt is.
    """
    longer = np.array([meeting.longer for meeting in meetings])
    spread = longer.std() or 1.0
    design = np.stack([np.ones(len(longer)), np.tanh(longer / spread)], axis=1)
    values = np.array([meeting.value for meeting in meetings])
    level = fitted(design, values, weights, np.array([0.0, RIDGE]) + 1e-9)[0]
    return float(1 / (1 + np.exp(-level)))


def over_prompts(
    meetings: List[Meeting], statistic: Callable[[np.ndarray], np.ndarray], seed: int, level: float = 0.95
) -> list[Interval]:
    """Some numbers, [k], with percentile intervals over resampled prompts. `statistic` gets the weight of each
    meeting."""
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(m.prompt for m in meetings))}
    of = np.array([places[m.prompt] for m in meetings])
    rng, n = np.random.default_rng(seed), len(places)
    whole = np.atleast_1d(statistic(np.ones(len(meetings))))
    drawn = np.stack(
        [np.atleast_1d(statistic(rng.multinomial(n, np.full(n, 1 / n))[of].astype(float))) for _ in range(RESAMPLES)]
    )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(mean=float(m), low=float(a), high=float(b), n=n) for m, a, b in zip(whole, low, high, strict=True)]


def won(meetings: List[Meeting], weights: np.ndarray) -> float:
    """The win rate of `a`, a tie being one half."""
    return float(np.average([meeting.value for meeting in meetings], weights=weights))
