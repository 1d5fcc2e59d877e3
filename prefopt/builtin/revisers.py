"""The core's own reviser: a language model that criticises and revises replies."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

from prefopt.api import (
    Completion,
    Draft,
    Message,
    Reviser,
    RevisingServices,
    Revision,
    Text,
    UserPath,
    Writer,
    show_text,
)

MATERIAL = (
    "Here are a prompt and a reply to it.\n\nPrompt:\n{prompt}\n\nReply:\n{reply}\n\nCritique request: {critique}"
)
AGAIN = "{before}\n\nCritique: {found}\n\nRevision request: {revise} Write the revised reply and nothing else."
GO_ON = ("\n\nCritique:", "\n\nRevision:")
"""Behind what a model without a chat template goes on."""


class ModelReviser(Reviser):
    """A Hugging Face model criticises a reply, then writes it again. It is asked through its chat template; without one
    as a text to go on with, in which it stops at an empty line. The stage's sampler draws what it writes."""

    name = "model"
    paper = "Bai et al. 2022, arXiv:2212.08073, section 3.1"

    path: UserPath | None = None
    """The folder of the model. Default: the model that wrote the drafts."""

    def open(self, services: RevisingServices) -> Asking:
        return Asking(services.writer(self.path))


@dataclass(frozen=True)
class Asking:
    """Asks a model twice: what is wrong with a draft, then for the draft without that."""

    write: Writer

    def __call__(self, drafts: List[Draft]) -> list[Revision]:
        asked = [_criticised(draft) for draft in drafts]
        critiques = self._written(asked, GO_ON[0], [f"{draft.key} critique" for draft in drafts])
        found = [i for i, critique in enumerate(critiques) if critique.critique]
        again = [_revised(drafts[i], asked[i], critiques[i]) for i in found]
        replies = self._written(again, GO_ON[1], [f"{drafts[i].key} revision" for i in found])
        for i, reply in zip(found, replies, strict=True):
            critiques[i] = _both(drafts[i], critiques[i], reply)
        return critiques

    def _written(self, asked: List[str], go_on: str, keys: List[str]) -> list[Revision]:
        """What the model writes, as critiques."""
        prompts: list[Text] = [(Message("user", text),) if self.write.chat else text + go_on for text in asked]
        return [self._read(completion) for completion in self.write(prompts, keys)]

    def _read(self, completion: Completion | None) -> Revision:
        if completion is None:
            return Revision(None, None, "the question leaves no room for an answer")
        text, stop = completion.text.strip(), ""
        if not self.write.chat:
            text, stop, _ = text.partition("\n\n")
        if not completion.finished and not stop:
            return Revision(None, None, "the answer was cut short: raise sampler.max_new_tokens")
        return Revision(text, None)


def _criticised(draft: Draft) -> str:
    prompt, critique = show_text(draft.prompt), draft.principle.critique
    return MATERIAL.format(prompt=prompt, reply=draft.reply.strip(), critique=critique)


def _revised(draft: Draft, before: str, found: Revision) -> str:
    return AGAIN.format(before=before, found=found.critique, revise=draft.principle.revise)


def _both(draft: Draft, critique: Revision, reply: Revision) -> Revision:
    """A critique and the reply it led to, which begins with the space that the draft begins with."""
    if reply.critique is None:
        return reply
    space = draft.reply[: len(draft.reply) - len(draft.reply.lstrip())]
    return Revision(critique.critique, f"{space}{reply.critique}" if reply.critique else None)
