"""Principles of the `replies` world, as somebody who works by them sees them: what in a reply is against one, and the
reply without that. It reads the language; what a reply is worth it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Final

from prefopt.bench.worlds.replies.language import ANSWERS, DAYS, MANNERS, Act, Kind, Request, read_sentences, with_order

Said = tuple[str, Act]
"""A sentence and what it means."""

SUBSTANCE: Final = (Kind.ANSWER, Kind.REFUSE, Kind.STALL)
EMPTY: Final = (Kind.STALL, Kind.FILL, Kind.FLATTER, Kind.NOISE)


@dataclass(frozen=True)
class Rule:
    """One principle at work: `faults` are the sentences against it, and what is missing; `mend` takes them away."""

    faults: Callable[[Request, List[Said]], list[str]]
    mend: Callable[[Request, List[Said]], list[str]]


def _answers(request: Request, act: Act) -> bool:
    return act.kind == Kind.ANSWER and act.topic == request.topic


def _texts(said: List[Said]) -> list[str]:
    return [text for text, _ in said]


# --- answer what was asked ------------------------------------------------------------------------------------------


def _unanswered(request: Request, said: List[Said]) -> list[str]:
    beside = [text for text, act in said if act.kind in SUBSTANCE and not _answers(request, act)]
    return beside if any(_answers(request, act) for _, act in said) else [*beside, "an answer is missing"]


def _answer(request: Request, said: List[Said]) -> list[str]:
    """An answer stands where the first thing of substance stood, nothing else of substance is left."""
    first = next((i for i, (_, act) in enumerate(said) if act.kind in SUBSTANCE), _end(said))
    rest = [(i, text) for i, (text, act) in enumerate(said) if act.kind not in SUBSTANCE or _answers(request, act)]
    before, after = [text for i, text in rest if i < first], [text for i, text in rest if i >= first]
    if any(_answers(request, act) for _, act in said):
        return [*before, *after]
    answer = ANSWERS[request.topic][0].format(order=request.order, day=DAYS[0])
    return [*before, answer, *after]


def _end(said: List[Said]) -> int:
    """Where the last sentence of substance could stand: before the close."""
    return next((i for i, (_, act) in enumerate(said) if act.kind == Kind.CLOSE), len(said))


# --- name the order asked about -------------------------------------------------------------------------------------


def _confused(request: Request, said: List[Said]) -> list[str]:
    return [text for text, act in said if act.order not in (None, request.order)]


def _set_right(request: Request, said: List[Said]) -> list[str]:
    return [with_order(text, request.order) for text, _ in said]


# --- greet, apologise to the upset, close ---------------------------------------------------------------------------


def _wanted(request: Request) -> tuple[Kind, ...]:
    return (Kind.GREET, *((Kind.APOLOGISE,) if request.upset else ()), Kind.CLOSE)


def _unmannered(request: Request, said: List[Said]) -> list[str]:
    there = {act.kind for _, act in said}
    return [f"no sentence to {kind}" for kind in _wanted(request) if kind not in there]


def _mannered(request: Request, said: List[Said]) -> list[str]:
    """Greeting and apology first, the close last."""
    wanted = _wanted(request)
    polite = {kind: next((t for t, act in said if act.kind == kind), MANNERS[kind][0]) for kind in wanted}
    middle = [text for text, act in said if act.kind not in wanted]
    return [*(polite[kind] for kind in wanted[:-1]), *middle, polite[Kind.CLOSE]]


# --- leave out what says nothing, do not scold ----------------------------------------------------------------------


def _idle(request: Request, act: Act) -> bool:
    return act.kind in EMPTY or (act.kind == Kind.APOLOGISE and not request.upset)


RULES: Final[Mapping[str, Rule]] = {
    "answer": Rule(_unanswered, _answer),
    "order": Rule(_confused, _set_right),
    "manners": Rule(_unmannered, _mannered),
    "brevity": Rule(
        lambda request, said: [text for text, act in said if _idle(request, act)],
        lambda request, said: _texts([one for one in said if not _idle(request, one[1])]),
    ),
    "kindness": Rule(
        lambda request, said: [text for text, act in said if act.kind == Kind.SCOLD],
        lambda request, said: _texts([one for one in said if one[1].kind != Kind.SCOLD]),
    ),
}
"""By the names of the principles."""


def faults(rule: Rule, request: Request, reply: str) -> list[str]:
    """What in a reply is against a principle."""
    return rule.faults(request, read_sentences(reply))


def mended(rule: Rule, request: Request, reply: str) -> str:
    """The reply without it, beginning with the space that separates it from the prompt."""
    return " " + " ".join(rule.mend(request, read_sentences(reply)))
