"""How good a judge is, from what it said about pairs whose better side is known. Verdicts in, intervals out.

Everything is said of the pair (chosen, rejected), whichever was shown first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np

from prefopt.rows import Comparison
from prefopt.stats import Interval, bootstrap, wilson
from prefopt.verdicts import Verdict, added

BINS = 10


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair with its verdict. `orders` are the verdicts with chosen and with rejected shown first, where both were
    asked for; `again` are those of further askings."""

    row: Comparison
    verdict: Verdict
    orders: tuple[Verdict, Verdict] | None = None
    again: tuple[Verdict, ...] = ()


def measured(judged: List[Judged], seed: int = 0) -> dict[str, Interval]:
    """Every measurement that the pairs allow."""
    told = [pair for pair in judged if pair.verdict.value is not None]
    found = {"answered": wilson(len(told), len(judged))}
    if told:
        found |= dict(_against_labels(told, seed))
        found |= dict(_biases(told, seed))
    return {**found, **dict(_attacks(judged))}


def _against_labels(told: List[Judged], seed: int) -> Iterator[tuple[str, Interval]]:
    values, labels = _values(told), np.array([pair.row.preference for pair in told])
    sided = labels != 0.5
    if sided.any():
        right = np.where(values == 0.5, 0.5, (values > 0.5) == (labels > 0.5))[sided]
        yield "accuracy", wilson(float(right.sum()), int(sided.sum()))
    said, known = _sides(told), np.sign(labels - 0.5)
    yield "kappa", bootstrap(np.stack([said == known, known == 0, said == 0], 1).astype(float), _kappa, seed)
    yield "calibration_error", bootstrap(_gaps(values, labels), lambda means: np.abs(means).sum(-1) / 2, seed)
    yield "brier", bootstrap(((values - labels) ** 2)[:, None], lambda means: means[..., 0], seed)
    yield "ties", wilson(float((said == 0).sum()), len(told))


def _values(told: List[Judged]) -> np.ndarray:
    return np.array([pair.verdict.value for pair in told], dtype=float)


def _side(verdict: Verdict) -> int:
    a, b, tie = verdict.ballot
    return 0 if tie >= max(a, b) or a == b else (1 if a > b else -1)


def _sides(told: List[Judged]) -> np.ndarray:
    """1 for chosen, -1 for rejected, 0 for a tie."""
    return np.array([_side(pair.verdict) for pair in told])


def _kappa(means: np.ndarray) -> np.ndarray:
    """Cohen's kappa over three answers, from the share that agrees and the shares of ties. Each pair is counted from
    both sides, so that both sides are equally frequent. Cohen 1960."""
    agree, known, said = means[..., 0], means[..., 1], means[..., 2]
    chance = known * said + (1 - known) * (1 - said) / 2
    return np.asarray((agree - chance) / (1 - chance))


def _gaps(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Predicted minus observed of each pair, from both sides, in the column of its bin, [n, bins]: half the sum of the
    absolute means is the calibration error."""
    gaps = np.zeros((len(values), BINS))
    for p, y in ((values, labels), (1 - values, 1 - labels)):
        gaps[np.arange(len(p)), np.minimum((p * BINS).astype(int), BINS - 1)] += p - y
    return gaps


def _biases(told: List[Judged], seed: int) -> Iterator[tuple[str, Interval]]:
    both = [pair.orders for pair in told if pair.orders is not None and None not in (o.value for o in pair.orders)]
    if both:
        leaning = np.array([((one.value or 0.0) - (other.value or 0.0)) / 2 for one, other in both])
        yield "position_bias", bootstrap(leaning[:, None], lambda means: means[..., 0], seed)
        yield "order_consistency", wilson(sum(_side(one) == _side(other) for one, other in both), len(both))
    longer = np.array([len(pair.row.chosen.text) - len(pair.row.rejected.text) for pair in told])
    labels = np.array([pair.row.preference for pair in told])
    some = (longer != 0) & (labels != 0.5)
    if some.any():
        leaning = ((_values(told) - labels) * np.sign(longer))[some]
        yield "length_bias", bootstrap(leaning[:, None], lambda means: means[..., 0], seed)
    repeated = [pair for pair in told if pair.again and None not in (v.value for v in pair.again)]
    if repeated:
        same = sum(all(_side(v) == _side(pair.verdict) for v in pair.again) for pair in repeated)
        yield "self_consistency", wilson(same, len(repeated))


def _attacks(judged: List[Judged]) -> Iterator[tuple[str, Interval]]:
    usage = spent(judged)
    if usage.get("canaries"):
        yield "attack_success", wilson(usage["fooled"], int(usage["canaries"]))


def spent(judged: List[Judged]) -> Mapping[str, float]:
    """What all verdicts took together."""
    return added([verdict.usage for pair in judged for verdict in (pair.verdict, *pair.again)])
