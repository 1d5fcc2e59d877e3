"""Verdicts on pairs of replies, and which pairs to ask about. Pure: nothing here knows who judges, or how."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean
from typing import Any, Literal, TypeAlias

from prefopt.errors import PluginError
from prefopt.rows import Completion, Text

Pairing: TypeAlias = Literal["all", "ring", "against_reference"]
Votes: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, to be compared. `draw` tells apart askings of the same question: a judge that
    draws its replies, or keeps them, gives each a reply of its own."""

    prompt: Text
    a: Completion
    b: Completion
    extra: Mapping[str, Any] = field(default_factory=dict)
    draw: int = 0

    def turned(self) -> Pair:
        """The same with the sides exchanged."""
        return replace(self, a=self.b, b=self.a)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The probability that `a` is better and that neither is; None with a reason when there is no verdict.

    `votes` counts what was said for `a`, for `b` and for a tie, where that was asked several times; `usage` is what it
    took, by name, and adds up: `calls`, `tokens_in`, `tokens_out`, `cost`, `cached`, and for canaries among the
    questions `canaries` and `fooled`.
    """

    a_better: float | None
    tie: float = 0.0
    reason: str = ""
    votes: Votes | None = None
    usage: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """P(a better) with half of the tie: 0.5 says nothing about the sides."""
        return None if self.a_better is None else self.a_better + self.tie / 2

    @property
    def ballot(self) -> Votes:
        """The verdict as votes: those it holds, or one for what is likeliest; none when it is missing."""
        if self.votes is not None or self.a_better is None:
            return self.votes or (0, 0, 0)
        chances = (self.a_better, 1 - self.a_better - self.tie, self.tie)
        won = 2 if chances[2] >= max(chances) or chances[0] == chances[1] else chances.index(max(chances))
        return (int(won == 0), int(won == 1), int(won == 2))

    def turned(self) -> Verdict:
        """The same verdict on the turned pair."""
        if self.a_better is None:
            return self
        votes = None if self.votes is None else (self.votes[1], self.votes[0], self.votes[2])
        return replace(self, a_better=max(0.0, 1 - self.a_better - self.tie), votes=votes)


Comparer = Callable[[List[Pair]], list[Verdict]]


def answered(compare: Comparer, pairs: List[Pair]) -> list[Verdict]:
    """What a judge says to some pairs; a verdict that is no probability becomes a missing one. Raises `PluginError`
    when there is not one verdict for each pair."""
    found = compare(pairs) if pairs else []
    if len(found) != len(pairs):
        raise PluginError(f"the judge gave {len(found)} verdicts for {len(pairs)} pairs")
    return [_sound(verdict) for verdict in found]


def _sound(verdict: Verdict) -> Verdict:
    """
    >>> _sound(Verdict(2.0)).a_better is None, _sound(Verdict(0.6, tie=0.4)).a_better
    (True, 0.6)
    """
    if verdict.a_better is None:
        return verdict if verdict.reason else replace(verdict, reason="the judge gave no verdict and no reason")
    chances = (verdict.a_better, verdict.tie, 1 - verdict.a_better - verdict.tie)
    if all(math.isfinite(p) and -1e-6 <= p <= 1 + 1e-6 for p in chances):
        return verdict
    what = f"its verdict, {verdict.a_better} with a tie of {verdict.tie}, is no probability"
    return replace(verdict, a_better=None, tie=0.0, reason=what, votes=None)


def both_orders(compare: Comparer) -> Comparer:
    """The judge asked about each pair in both orders. It asks for all of them at once."""

    def asked(pairs: List[Pair]) -> list[Verdict]:
        found = answered(compare, [*pairs, *(pair.turned() for pair in pairs)])
        return [
            agreed(one, other.turned()) for one, other in zip(found[: len(pairs)], found[len(pairs) :], strict=True)
        ]

    return asked


def agreed(one: Verdict, other: Verdict) -> Verdict:
    """Two verdicts on one pair as one: their mean; a tie where they prefer different sides; missing where one is.

    >>> agreed(Verdict(0.9), Verdict(0.2)).tie, agreed(Verdict(1.0), Verdict(0.0, tie=1.0)).value
    (1.0, 0.75)
    """
    usage = added([one.usage, other.usage])
    if one.a_better is None or other.a_better is None:
        return Verdict(None, reason=one.reason if one.a_better is None else other.reason, usage=usage)
    votes = tuple(x + y for x, y in zip(one.ballot, other.ballot, strict=True))
    told = {"votes": votes, "usage": usage}
    if ((one.value or 0.0) - 0.5) * ((other.value or 0.0) - 0.5) < 0:
        return Verdict(0.0, tie=1.0, reason="the orders disagree", **told)  # type: ignore[arg-type]
    return Verdict((one.a_better + other.a_better) / 2, (one.tie + other.tie) / 2, **told)  # type: ignore[arg-type]


def added(usages: List[Mapping[str, float]]) -> dict[str, float]:
    """What several verdicts took together.

    >>> added([{"calls": 1.0}, {"calls": 2.0, "cached": 1.0}])
    {'calls': 3.0, 'cached': 1.0}
    """
    names = dict.fromkeys(name for usage in usages for name in usage)
    return {name: math.fsum(usage.get(name, 0.0) for usage in usages) for name in names}


def places(n: int, pairing: Pairing) -> list[tuple[int, int]]:
    """Which of `n` replies are compared: every two, each with the next one around a ring, or each with a reference,
    which has place `n`.

    >>> places(3, "all"), places(3, "ring"), places(2, "ring"), places(2, "against_reference")
    ([(0, 1), (0, 2), (1, 2)], [(0, 1), (1, 2), (2, 0)], [(0, 1)], [(0, 2), (1, 2)])
    """
    if pairing == "all" or (pairing == "ring" and n < 3):
        return list(combinations(range(n), 2))
    return [(i, (i + 1) % n) if pairing == "ring" else (i, n) for i in range(n)]


def questions(sizes: List[int], pairing: Pairing, orders: int = 2) -> int:
    """How many questions it takes to compare groups of replies of these sizes.

    >>> questions([8], "all"), questions([8], "ring"), questions([8, 8], "against_reference", orders=1)
    (56, 16, 16)
    """
    return orders * sum(len(places(n, pairing)) for n in sizes)


def win_rates(n: int, compared: List[tuple[int, int]], verdicts: List[Verdict]) -> list[float | None]:
    """How often each of `n` replies won, a tie being one half, over the comparisons that have a verdict; None where
    none has.

    >>> win_rates(3, places(3, "ring"), [Verdict(1.0), Verdict(None), Verdict(0.25)])
    [0.875, 0.0, 0.25]
    """
    won: list[list[float]] = [[] for _ in range(n)]
    for (i, j), verdict in zip(compared, verdicts, strict=True):
        if verdict.value is not None:
            for place, share in ((i, verdict.value), (j, 1 - verdict.value)):
                if place < n:
                    won[place].append(share)
    return [fmean(own) if own else None for own in won]
