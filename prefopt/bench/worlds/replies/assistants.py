"""Who works by principles in the `replies` world: an assistant that revises replies, a judge that compares them. Both
read prompt, replies and principle, and make mistakes as often as they say."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from functools import partial

from pydantic import Field

from prefopt.api import (
    Comparer,
    Draft,
    Judge,
    Pair,
    Reviser,
    RevisingServices,
    Revision,
    Services,
    Verdict,
    principle_of,
    show_text,
)
from prefopt.bench.worlds.replies.language import Request, read_request
from prefopt.bench.worlds.replies.principles import RULES, Rule, faults, mended


class PrincipledAssistant(Reviser):
    """A simulated shop assistant who finds what is against a principle in a reply and takes it away."""

    name = "replies_reviser"

    skill: float = Field(0.9, ge=0, le=1)
    """How often that succeeds. Otherwise nothing is found and nothing is changed."""

    def open(self, services: RevisingServices) -> Callable[[List[Draft]], list[Revision]]:
        return partial(self._all, services)

    def _all(self, services: Services, drafts: List[Draft]) -> list[Revision]:
        return [self._one(services, draft) for draft in drafts]

    def _one(self, services: Services, draft: Draft) -> Revision:
        try:
            rule, request = _read(draft.principle.id, show_text(draft.prompt))
        except ValueError as error:
            return Revision(None, None, str(error))
        found = faults(rule, request, draft.reply)
        if not found or float(services.rng("replies reviser", draft.key).random()) >= self.skill:
            return Revision("Nothing is to be changed.", draft.reply)
        reply = mended(rule, request, draft.reply)
        return Revision(
            f"To be changed: {'; '.join(found)}", reply, "" if reply.strip() else "nothing is left of a reply"
        )


class PrincipledJudge(Judge):
    """A simulated reader who compares two replies by the principle drawn for them, and by nothing else: the one with
    less against it is better."""

    name = "replies_principles"

    mistakes: float = Field(0.0, ge=0, le=0.5)
    """Share of pairs in which the worse reply is called better, drawn by their text and the run's seed."""

    @property
    def reads_principles(self) -> bool:
        return True

    def open(self, services: Services) -> Comparer:
        return partial(self._all, services)

    def _all(self, services: Services, pairs: List[Pair]) -> list[Verdict]:
        return [self._one(services, pair) for pair in pairs]

    def _one(self, services: Services, pair: Pair) -> Verdict:
        principle = principle_of(pair.extra)
        if principle is None:
            return Verdict(None, reason="no principle was drawn for this pair: name a constitution")
        try:
            rule, request = _read(principle.id, show_text(pair.prompt))
        except ValueError as error:
            return Verdict(None, reason=str(error))
        a, b = (len(faults(rule, request, side.text)) for side in (pair.a, pair.b))
        verdict = Verdict(float(a < b), tie=float(a == b))
        texts = sorted((pair.a.text, pair.b.text))
        slips = float(services.rng("replies principles", repr(pair.prompt), *texts, pair.draw).random()) < self.mistakes
        return verdict.turned() if slips else verdict


def _read(name: str, prompt: str) -> tuple[Rule, Request]:
    """Raises `ValueError` for a principle nobody taught, and for a prompt that asks nothing."""
    if name not in RULES:
        raise ValueError(f"no principle `{name}` is known in the replies world: {', '.join(RULES)}")
    return RULES[name], read_request(prompt)
