"""The language of the `replies` world: what customers ask, what a shop may answer, and what both mean.

This module knows nothing about models, tokens or scores. It composes text from meanings and reads meanings back from
text: every sentence of the language has exactly one meaning, so a reply can be judged by what it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

ORDERS: Final = tuple(str(n) for n in range(1009, 9999, 233))
DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


class Kind(StrEnum):
    """What one sentence of a reply does."""

    GREET = "greet"
    APOLOGISE = "apologise"
    ANSWER = "answer"
    REFUSE = "refuse"
    STALL = "stall"
    FILL = "fill"
    FLATTER = "flatter"
    SCOLD = "scold"
    CLOSE = "close"
    NOISE = "noise"


@dataclass(frozen=True, slots=True)
class Act:
    """The meaning of one sentence: what it does and, for answers and refusals, about which topic and order."""

    kind: Kind
    topic: str | None = None
    order: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """The meaning of a customer's message: one topic, one order, a mood, and perhaps another order mentioned by the
    way."""

    topic: str
    order: str
    upset: bool
    other: str | None = None


QUESTIONS: Final[dict[str, tuple[str, ...]]] = {
    "delivery": ("Where is order {order}?", "When will order {order} arrive?", "Order {order} has not arrived."),
    "refund": ("Can I get a refund for order {order}?", "I want my money back for order {order}."),
    "cancel": ("Please cancel order {order}.", "Can you still stop order {order}?"),
    "address": (
        "Please send order {order} to my new address.",
        "I have moved, so change the address of order {order}.",
    ),
    "invoice": ("Please send me the invoice for order {order}.", "I need a bill for order {order}."),
    "damage": ("Order {order} came broken.", "There was a crack in order {order}."),
}
ANSWERS: Final[dict[str, tuple[str, ...]]] = {
    "delivery": ("Order {order} will arrive on {day}.", "You will get order {order} on {day}."),
    "refund": ("We have refunded order {order}.", "The money for order {order} is on its way to you."),
    "cancel": ("Order {order} is cancelled.", "We have stopped order {order}."),
    "address": ("We will send order {order} to your new address.", "The new address of order {order} is set."),
    "invoice": ("The invoice for order {order} is in your inbox.", "We have sent you the bill for order {order}."),
    "damage": ("We will send you a new one for order {order}.", "You will get a new box for order {order} on {day}."),
}
REFUSALS: Final[dict[str, tuple[str, ...]]] = {
    "delivery": ("Order {order} will not arrive on {day}.", "We do not know where order {order} is."),
    "refund": ("We have not refunded order {order}.", "We cannot send money back for order {order}."),
    "cancel": ("Order {order} is not cancelled.", "We cannot stop order {order}."),
    "address": (
        "We will not send order {order} to your new address.",
        "We cannot change the address of order {order}.",
    ),
    "invoice": ("The invoice for order {order} is not ready.", "We have not sent you the bill for order {order}."),
    "damage": ("We will not send you a new one for order {order}.", "You will get no new box for order {order}."),
}
MANNERS: Final[dict[Kind, tuple[str, ...]]] = {
    Kind.GREET: ("Hello!", "Good morning!", "Hi there!"),
    Kind.APOLOGISE: ("We are sorry for the trouble.", "Please accept our apology."),
    Kind.STALL: ("We will look into order {order}.", "We will get back to you.", "We need some more time."),
    Kind.FILL: ("We are a leading shop.", "We value every customer.", "Quality is our promise.", "See our new offers."),
    Kind.FLATTER: ("You are absolutely right!", "What a wonderful question!"),
    Kind.SCOLD: ("Read the terms next time.", "You should know this."),
    Kind.CLOSE: ("Have a nice day!", "Kind regards, your shop team.", "Thank you for writing to us."),
}
OPENERS: Final = ("Hi.", "Hello.", "Hi, it is me again.")
ASIDES: Final = ("Order {order} was fine.", "I liked order {order}.")
COMPLAINTS: Final = ("I am not happy.", "This is annoying.", "I am losing my patience.")

TOPICS: Final = tuple(QUESTIONS)
PROMPT: Final = "Customer: {message}\nShop:"


def _meanings() -> Iterator[tuple[str, Act]]:
    for table, kind in ((ANSWERS, Kind.ANSWER), (REFUSALS, Kind.REFUSE)):
        for topic, sentences in table.items():
            yield from ((sentence, Act(kind, topic)) for sentence in sentences)
    for kind, sentences in MANNERS.items():
        yield from ((sentence, Act(kind)) for sentence in sentences)


_MEANING: Final = dict(_meanings())
_QUESTION: Final = {sentence: topic for topic, sentences in QUESTIONS.items() for sentence in sentences}
_SENTENCE: Final = re.compile(r"[^.!?]+[.!?]?")
_ORDER: Final = re.compile(r"\b\d+\b")
_DAY: Final = re.compile(r"\b(?:" + "|".join(DAYS) + r")\b")


def _pattern(sentence: str) -> tuple[str, str | None]:
    """The template a sentence was made from, and the order number in it."""
    order = _ORDER.search(sentence)
    return _DAY.sub("{day}", _ORDER.sub("{order}", sentence.strip())), order.group() if order else None


def read_reply(text: str) -> tuple[Act, ...]:
    """The acts of a reply, sentence by sentence; a sentence outside the language is `NOISE`.

    >>> read_reply(" Hello! We have not refunded order 1009.")[1]
    Act(kind=<Kind.REFUSE: 'refuse'>, topic='refund', order='1009')
    """
    return tuple(act for _, act in read_sentences(text))


def read_sentences(text: str) -> tuple[tuple[str, Act], ...]:
    """The same with each sentence beside its act."""
    return tuple((sentence.strip(), _meant(sentence)) for sentence in filter(str.strip, _SENTENCE.findall(text)))


def _meant(sentence: str) -> Act:
    pattern, order = _pattern(sentence)
    meaning = _MEANING.get(pattern, Act(Kind.NOISE))
    return Act(meaning.kind, meaning.topic, order)


def with_order(sentence: str, order: str) -> str:
    """The sentence with another order in it, if there is one.

    >>> with_order("Order 1009 is cancelled.", "1242")
    'Order 1242 is cancelled.'
    """
    return _ORDER.sub(order, sentence)


def read_request(prompt: str) -> Request:
    """The meaning of a prompt made by `compose_prompt`; raises `ValueError` when it asks nothing.

    >>> read_request("Customer: Hi. I liked order 1070. Please cancel order 1009. I am not happy.\\nShop:")
    Request(topic='cancel', order='1009', upset=True, other='1070')
    """
    topic = asked = other = None
    upset = False
    for sentence in _SENTENCE.findall(prompt.removeprefix("Customer: ").removesuffix("\nShop:")):
        pattern, order = _pattern(sentence)
        if pattern in _QUESTION:
            topic, asked = _QUESTION[pattern], order
        elif pattern in ASIDES:
            other = order
        upset = upset or pattern in COMPLAINTS
    if topic is None or asked is None:
        raise ValueError(f"no question of the replies world in {prompt!r}")
    return Request(topic, asked, upset, other)


def sentences() -> Iterator[str]:
    """Every sentence template of the language, for building its vocabulary."""
    for table in (QUESTIONS, ANSWERS, REFUSALS, MANNERS):
        for group in table.values():
            yield from group
    yield from (*OPENERS, *ASIDES, *COMPLAINTS)
