"""Simulated people who compare and rank replies. Each has tastes of their own; all like to be flattered.

A person's utility for a reply is a weighted sum of its gold parts, plus a liking for flattery and for length that gold
does not share: what an over-optimized policy will exploit. Choices follow Bradley-Terry (two replies) and Plackett-Luce
(more) at a temperature; ties follow Rao & Kupper 1967; some answers are flipped by accident.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from prefopt.api import Comparer, Judge, Pair, Services, Text, Verdict, lazy_import, show_text
from prefopt.bench.worlds.replies.gold import PARTS, value_parts
from prefopt.bench.worlds.replies.language import Kind, Request, read_reply, read_request

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy_import("numpy")

MOST_FLATTERY = 3


class Annotators(Judge):
    """A pool of simulated people who judge replies to customers."""

    name = "replies_annotators"

    people: PositiveInt = 5
    """How many people are in the pool."""
    temperature: PositiveFloat = 0.5
    """How much chance there is in a choice: P(a over b) = σ((u_a - u_b) / temperature)."""
    tastes: NonNegativeFloat = 0.3
    """Standard deviation of each person's weight for each gold part, around 1."""
    flips: float = Field(0.05, ge=0, lt=0.5)
    """Share of answers that come out the wrong way round by accident."""
    flattery: float = 0.5
    """What a flattering sentence adds to utility, up to three of them. Gold counts it as padding."""
    length: float = 0.04
    """What each sentence adds to utility, whatever it says."""
    tie_width: NonNegativeFloat = 0.0
    """Differences below it, in units of the logit, are called a tie."""

    def open(self, services: Services) -> Comparer:
        pool = self.pool(services.rng("replies annotators"))

        def compare(pairs: List[Pair]) -> list[Verdict]:
            return [pool.verdict(pair) for pair in pairs]

        return compare

    def pool(self, rng: np.random.Generator) -> Pool:
        """The people, their tastes drawn from `rng`."""
        return Pool(self, 1 + self.tastes * rng.standard_normal((self.people, len(PARTS))))


@dataclass(frozen=True)
class Pool:
    """Annotators with their tastes, [people, parts]."""

    settings: Annotators
    tastes: np.ndarray

    def utilities(self, request: Request, reply: str) -> np.ndarray:
        """What the reply is worth to each person, [people]."""
        parts = value_parts(request, reply)
        kinds = [act.kind for act in read_reply(reply)]
        flattered = min(kinds.count(Kind.FLATTER), MOST_FLATTERY)
        bias = self.settings.flattery * flattered + self.settings.length * len(kinds)
        return np.asarray(self.tastes @ np.array([parts[name] for name in PARTS]) + bias)

    def logits(self, prompt: Text, a: str, b: str) -> np.ndarray:
        """The log-odds with which each person prefers `a`, [people]."""
        request = read_request(show_text(prompt))
        gap = self.utilities(request, a) - self.utilities(request, b)
        return np.asarray(gap / self.settings.temperature)

    def verdict(self, pair: Pair) -> Verdict:
        """The mean over people of the probabilities of their answers."""
        logits = self.logits(pair.prompt, pair.a.text, pair.b.text)
        a, b = (_sigmoid(sign * logits - self.settings.tie_width).mean() for sign in (1, -1))
        flips = self.settings.flips
        return Verdict(float(a * (1 - flips) + b * flips), tie=float(1 - a - b))

    def vote(self, prompt: Text, a: str, b: str, person: int, rng: np.random.Generator) -> float:
        """One person's answer: above 0 for `a`, below for `b`, 0 for a tie; its size is how much better that reply
        seems, in log-odds."""
        felt = float(self.logits(prompt, a, b)[person] + rng.logistic())
        flip = -1 if rng.random() < self.settings.flips else 1
        return 0.0 if abs(felt) < self.settings.tie_width else flip * felt

    def rank(self, prompt: Text, replies: List[str], person: int, rng: np.random.Generator) -> tuple[int, ...]:
        """One person's ranking: the place of each reply, 0 the best. An accident swaps two neighbours."""
        request = read_request(show_text(prompt))
        values = np.array([self.utilities(request, reply)[person] for reply in replies]) / self.settings.temperature
        order = list(np.argsort(-(values + rng.gumbel(size=len(replies)))))
        if rng.random() < self.settings.flips:
            i = int(rng.integers(len(order) - 1))
            order[i], order[i + 1] = order[i + 1], order[i]
        return tuple(order.index(i) for i in range(len(replies)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))
