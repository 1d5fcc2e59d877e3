"""Who makes a reply better by a written principle. Knows rows and components; not how a model is reached, and nothing
of what a reply is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Protocol

from pydantic import BaseModel, ConfigDict, Field

from prefopt.components import Component, Services
from prefopt.errors import PluginError
from prefopt.rows import Completion, Text

PRINCIPLE: Final = "principle"
"""The column of a row with what was drawn for it."""
Words = Annotated[str, Field(min_length=1)]


class Principle(BaseModel):
    """One principle of a constitution."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=64)]
    """What it is called in the rows."""
    critique: Words
    """What a critique is to look for."""
    revise: Words
    """How a reply is to be changed."""
    compare: Words | None = None
    """What makes one reply better than another, for labels."""


def principle_of(extra: Mapping[str, Any]) -> Principle | None:
    """The principle that a stage drew for a row, or for a pair, with these columns. What a data file says in a column
    of that name is none: a judge is not instructed by data."""
    drawn = extra.get(PRINCIPLE)
    return drawn if isinstance(drawn, Principle) else None


@dataclass(frozen=True, slots=True)
class Draft:
    """A reply to be made better by one principle. `key` names the randomness of this asking."""

    prompt: Text
    reply: str
    principle: Principle
    key: str


@dataclass(frozen=True, slots=True)
class Revision:
    """What is wrong with a draft, and the reply without it; None with a `reason` where either is missing. `usage` is
    what it took, as in `Verdict`."""

    critique: str | None
    reply: str | None
    reason: str = ""
    usage: Mapping[str, float] = field(default_factory=dict)


Revise = Callable[[List[Draft]], list[Revision]]


class Writer(Protocol):
    """A language model that writes."""

    @property
    def chat(self) -> bool:
        """Whether it has a chat template: it then reads conversations, otherwise text to go on with."""

    def __call__(self, prompts: List[Text], keys: List[str]) -> list[Completion | None]:
        """A completion of each prompt, drawn by its key; None where the prompt leaves no room for one."""


class RevisingServices(Services, Protocol):
    """What a reviser may ask for when it is opened."""

    def writer(self, path: str | None) -> Writer:
        """The language model at `path`; without one, that of the stage."""


class Reviser(Component):
    """Criticises replies by principles and revises them. It reads prompt, draft and principle; no reward is ever
    shown to it."""

    kind: ClassVar[str] = "reviser"

    def open(self, services: RevisingServices) -> Revise:
        """The function that revises; called once."""
        return self.revise

    def revise(self, drafts: List[Draft]) -> list[Revision]:
        """One revision of each draft. A missing one is `Revision(None, None, reason)`, never the draft."""
        raise NotImplementedError(f"reviser `{self.name}` must define revise or open")


def revised(revise: Revise, drafts: List[Draft]) -> list[Revision]:
    """What a reviser makes of some drafts; where critique or reply is empty it is missing. Raises `PluginError` when
    there is not one revision for each draft."""
    found = revise(drafts) if drafts else []
    if len(found) != len(drafts):
        raise PluginError(f"the reviser gave {len(found)} revisions of {len(drafts)} drafts")
    return [_sound(revision) for revision in found]


def _sound(revision: Revision) -> Revision:
    """
    >>> _sound(Revision("It shouts.", " ")).reason, _sound(Revision(None, None, "asleep")).reason
    ('there is no revision', 'asleep')
    """
    for name, text in (("critique", revision.critique), ("revision", revision.reply)):
        if text is None or not text.strip():
            return Revision(None, None, revision.reason or f"there is no {name}", revision.usage)
    return revision
