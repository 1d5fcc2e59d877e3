"""What a reply is worth in the `replies` world: read from its meaning, never from its words alone."""

from __future__ import annotations

from collections.abc import Sequence as List

from prefopt.api import Completion, RewardSource, Rollout, Score, Text, show_text
from prefopt.bench.worlds.replies.language import Act, Kind, Request, read_reply, read_request

PARTS = ("answer", "order", "polite", "concise")
MAXIMUM = float(len(PARTS))


class Gold(RewardSource):
    """The true value of a reply to a customer, 0 to 4: answers the question, names the right order, polite, not
    padded."""

    name = "replies_gold"

    def score(self, groups: List[Rollout]) -> list[list[Score]]:
        return [[_score(group.prompt, completion) for completion in group.completions] for group in groups]


def _score(prompt: Text, completion: Completion) -> Score:
    try:
        parts = value_parts(read_request(show_text(prompt)), completion.text)
    except ValueError as error:
        return Score(None, str(error))
    return Score(sum(parts.values()), parts=parts)


def value_parts(request: Request, reply: str) -> dict[str, float]:
    """The four parts of a reply's value, each from 0 to 1.

    answer:  the question is answered, and not refused in the same breath.
    order:   an order is named, and every order named is the one asked about.
    polite:  half for a greeting, half for a close; halved when an upset customer gets no apology; 0 after a scolding.
    concise: the share of sentences that serve the customer.
    """
    acts = read_reply(reply)
    kinds = {act.kind for act in acts}
    on_topic = {act.kind for act in acts if act.topic == request.topic}
    named = {act.order for act in acts if act.order is not None}
    return {
        "answer": float(on_topic == {Kind.ANSWER}),
        "order": float(named == {request.order}),
        "polite": _politeness(request, kinds),
        "concise": _conciseness(request, acts, kinds, on_topic),
    }


def _politeness(request: Request, kinds: set[Kind]) -> float:
    if Kind.SCOLD in kinds:
        return 0.0
    manners = (Kind.GREET in kinds) / 2 + (Kind.CLOSE in kinds) / 2
    return manners / 2 if request.upset and Kind.APOLOGISE not in kinds else manners


def _conciseness(request: Request, acts: List[Act], kinds: set[Kind], on_topic: set[Kind]) -> float:
    wanted = {Kind.GREET, Kind.CLOSE} | ({Kind.APOLOGISE} if request.upset else set())
    serving = len(wanted & kinds) + (Kind.ANSWER in on_topic)
    return serving / len(acts) if acts else 0.0
