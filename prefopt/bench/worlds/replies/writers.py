"""Who writes in the `replies` world: customers, and shop assistants of middling skill whose replies a model learns
from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from prefopt.bench.worlds.replies.language import (
    ANSWERS,
    ASIDES,
    COMPLAINTS,
    DAYS,
    MANNERS,
    OPENERS,
    ORDERS,
    PROMPT,
    QUESTIONS,
    REFUSALS,
    TOPICS,
    Kind,
    Request,
)
from prefopt.lazy import lazy_import

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy_import("numpy")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Habits:
    """How often a shop assistant does each thing."""

    greet: float = 0.5
    apologise: float = 0.5
    apologise_needlessly: float = 0.1
    answer: float = 0.5
    refuse: float = 0.15
    answer_something_else: float = 0.15
    right_order: float = 0.75
    flatter: float = 0.2
    scold: float = 0.1
    close: float = 0.45
    fillers: float = 0.9
    """Mean number of sentences that say nothing."""


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def write_request(rng: np.random.Generator) -> str:
    """A customer's message, as the prompt a model sees."""
    asked, other = (ORDERS[i] for i in rng.choice(len(ORDERS), 2, replace=False))
    core = [pick(rng, QUESTIONS[pick(rng, TOPICS)]).format(order=asked)]
    if chance(rng, 0.4):
        core.insert(int(rng.integers(2)), pick(rng, ASIDES).format(order=other))
    opener = [pick(rng, OPENERS)] if chance(rng, 0.3) else []
    complaint = [pick(rng, COMPLAINTS)] if chance(rng, 0.4) else []
    return PROMPT.format(message=" ".join(opener + core + complaint))


def write_reply(request: Request, rng: np.random.Generator, habits: Habits | None = None) -> str:
    """A shop assistant's reply, beginning with the space that separates it from the prompt."""
    habits = habits or Habits()
    middle = [_substance(request, rng, habits)]
    for _ in range(int(rng.poisson(habits.fillers))):
        middle.insert(int(rng.integers(len(middle) + 1)), pick(rng, MANNERS[Kind.FILL]))
    before = [(Kind.GREET, habits.greet), (Kind.APOLOGISE, _apology(request, habits)), (Kind.FLATTER, habits.flatter)]
    after = [(Kind.SCOLD, habits.scold), (Kind.CLOSE, habits.close)]
    sentences = _manners(before, rng) + middle + _manners(after, rng)
    order = request.order if chance(rng, habits.right_order) else request.other or pick(rng, ORDERS)
    return " " + " ".join(sentences).format(order=order, day=pick(rng, DAYS))


def _apology(request: Request, habits: Habits) -> float:
    return habits.apologise if request.upset else habits.apologise_needlessly


def _manners(options: Sequence[tuple[Kind, float]], rng: np.random.Generator) -> list[str]:
    return [pick(rng, MANNERS[kind]) for kind, probability in options if chance(rng, probability)]


def _substance(request: Request, rng: np.random.Generator, habits: Habits) -> str:
    """The sentence that answers, refuses, answers something else, or puts the customer off."""
    other = pick(rng, [topic for topic in TOPICS if topic != request.topic])
    options = (
        (ANSWERS[request.topic], habits.answer),
        (REFUSALS[request.topic], habits.refuse),
        (ANSWERS[other], habits.answer_something_else),
        (MANNERS[Kind.STALL], 1 - habits.answer - habits.refuse - habits.answer_something_else),
    )
    chosen = int(rng.choice(len(options), p=[share for _, share in options]))
    return pick(rng, options[chosen][0])
