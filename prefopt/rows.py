"""Rows: what a person would write. Text only; this module knows nothing about tokens, tensors or files.

Every row has a prompt, and `sequences()` says which (prompt, completion) pairs it holds and what role each plays.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, ClassVar, TypeAlias

from prefopt.errors import DataError


class Role(IntEnum):
    """What a sequence is in its group. Stored as an integer column of the batch."""

    DEMONSTRATION = 0
    CHOSEN = 1
    REJECTED = 2
    RANKED = 3
    DESIRABLE = 4
    UNDESIRABLE = 5
    PROBE = 6
    SAMPLE = 7
    OPENING = 8
    """The prompt itself, scored as a completion of nothing."""
    OPPONENT = 9
    """A sample that the others are compared with: of the reference, of a mixture, or a greedy one."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is `system`, `user`, `assistant` or what the chat template knows."""

    role: str
    content: str


Text: TypeAlias = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply. `ids` and `logps` are the sampled tokens and their log-probabilities, kept as drawn: a round trip
    through text changes tokens. `finished` is False for a reply cut short, which then has no end-of-sequence
    token."""

    text: str
    ids: tuple[int, ...] | None = None
    logps: tuple[float, ...] | None = None
    finished: bool = True
    source: str | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Sequence:
    """A prompt with one completion: what is tokenized and scored. `group` joins the sequences of one row within a step;
    `weight` multiplies the sequence's share of every mean; `fields` are the row's numbers, by name."""

    prompt: Text
    completion: Completion
    role: Role
    group: int
    weight: float = 1.0
    fields: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`index` is the row's place in its source; `extra` the columns prefopt does not know, passed on to rewards."""

    kind: ClassVar[str] = "row"
    prompt: Text
    index: int = 0
    weight: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def sequences(self, group: int) -> list[Sequence]:
        """The sequences of this row, all in `group`."""
        return []

    def _sequence(self, completion: Completion, role: Role, group: int, **fields: float | None) -> Sequence:
        present = {name: float(value) for name, value in fields.items() if value is not None}
        return Sequence(self.prompt, completion, role, group, self.weight, present)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(Row):
    """A prompt alone: something to sample from."""

    kind: ClassVar[str] = "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration(Row):
    """A reply to imitate."""

    kind: ClassVar[str] = "demonstration"
    completion: Completion

    def sequences(self, group: int) -> list[Sequence]:
        return [self._sequence(self.completion, Role.DEMONSTRATION, group)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Row):
    """Two replies. `preference` is the probability that `chosen` is better (at least 0.5, which is a tie); `margin` how
    much better it is said to be; `votes` the number of raters for chosen, rejected and tie."""

    kind: ClassVar[str] = "comparison"
    chosen: Completion
    rejected: Completion
    preference: float = 1.0
    margin: float | None = None
    votes: tuple[int, int, int] | None = None

    def upright(self) -> Comparison:
        """The same comparison with the preferred side as `chosen`."""
        if self.preference >= 0.5:
            return self
        margin = None if self.margin is None else -self.margin
        votes = None if self.votes is None else (self.votes[1], self.votes[0], self.votes[2])
        turned = replace(self, preference=1 - self.preference, margin=margin, votes=votes)
        return replace(turned, chosen=self.rejected, rejected=self.chosen)

    def sequences(self, group: int) -> list[Sequence]:
        numbers = {"preference": self.preference, "margin": self.margin}
        return [
            self._sequence(self.chosen, Role.CHOSEN, group, **numbers),
            self._sequence(self.rejected, Role.REJECTED, group, **numbers),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking(Row):
    """K replies; `ranks[i]` is the place of `completions[i]`, 0 the best, equal places are ties. `votes` holds one such
    tuple for each rater, when they are known one by one."""

    kind: ClassVar[str] = "ranking"
    completions: tuple[Completion, ...]
    ranks: tuple[int, ...]
    votes: tuple[tuple[int, ...], ...] = ()

    def sequences(self, group: int) -> list[Sequence]:
        """Best first."""
        order = sorted(range(len(self.ranks)), key=lambda i: self.ranks[i])
        return [
            self._sequence(self.completions[i], Role.RANKED, group, rank=self.ranks[i], score=self.completions[i].score)
            for i in order
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement(Row):
    """One reply, called desirable or not."""

    kind: ClassVar[str] = "judgement"
    completion: Completion
    desirable: bool

    def sequences(self, group: int) -> list[Sequence]:
        role = Role.DESIRABLE if self.desirable else Role.UNDESIRABLE
        return [self._sequence(self.completion, role, group)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Row):
    """The replies drawn for one prompt; each completion's `score` is its reward, None when it could not be scored.
    `roles` says what each was drawn as; without it all are samples."""

    kind: ClassVar[str] = "rollout"
    completions: tuple[Completion, ...]
    roles: tuple[Role, ...] = ()

    def sequences(self, group: int) -> list[Sequence]:
        roles = self.roles or (Role.SAMPLE,) * len(self.completions)
        return [
            self._sequence(c, role, group, score=c.score, finished=float(c.finished))
            for c, role in zip(self.completions, roles, strict=True)
        ]

    def of(self, role: Role) -> tuple[Completion, ...]:
        """The completions drawn as `role`."""
        roles = self.roles or (Role.SAMPLE,) * len(self.completions)
        return tuple(c for c, own in zip(self.completions, roles, strict=True) if own == role)

    def select(self, index: List[int]) -> Rollout:
        """The completions at these places."""
        roles = tuple(self.roles[i] for i in index) if self.roles else ()
        return replace(self, completions=tuple(self.completions[i] for i in index), roles=roles)

    def scored(self, scores: List[float | None]) -> Rollout:
        """The same rollout with `scores`, one for each completion."""
        pairs = zip(self.completions, scores, strict=True)
        return replace(self, completions=tuple(replace(c, score=s) for c, s in pairs))


ROW_KINDS: tuple[type[Row], ...] = (Prompt, Demonstration, Comparison, Ranking, Judgement, Rollout)


def opening(row: Row, group: int) -> Sequence:
    """The prompt of a row as something to score, in the row's group. Raises `DataError` for a conversation."""
    fields = next((s.fields for s in row.sequences(group)), {})
    return Sequence("", Completion(_plain(row), finished=False), Role.OPENING, group, row.weight, fields)


def joined(row: Demonstration, group: int) -> Sequence:
    """Prompt and completion as one thing to score. Raises `DataError` for a conversation."""
    whole = replace(row.completion, text=_plain(row) + row.completion.text, ids=None)
    (own,) = row.sequences(group)
    return replace(own, prompt="", completion=whole)


def _plain(row: Row) -> str:
    if not isinstance(row.prompt, str):
        raise DataError(
            "a conversation is never scored as a whole: its template is no text of anybody's",
            fix="Score completions only; data.train_on: all adds the assistant's earlier turns.",
        )
    return row.prompt


def show_text(text: Text) -> str:
    """A prompt as a person reads it.

    >>> show_text((Message("user", "Hi"),))
    'user: Hi'
    """
    return text if isinstance(text, str) else "\n".join(f"{m.role}: {m.content}" for m in text)
