"""What each kind of stage does with some of its rows. Knows neither files nor how many rows there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from typing import Any

from prefopt.config.constitution import read_constitution
from prefopt.config.making import LabelConfig, Making, ReviseConfig, SampleConfig
from prefopt.data.adapt import adapt
from prefopt.making.labels import Item, compared, in_drawn_order, why_not
from prefopt.making.lines import carried, replies_of, several
from prefopt.making.services import MakingServices
from prefopt.revising import PRINCIPLE, Draft, Principle, Revise, Revision, principle_of, revised
from prefopt.rows import Demonstration, Rollout, Row
from prefopt.verdicts import Comparer, Verdict, added, both_orders

TOO_LONG = "the prompt is too long"
ALIKE = "all replies are the same"
NONE_OF_ITS_OWN = "the row has no reply that is good"


@dataclass(frozen=True)
class Outcome:
    """What became of a row: its record, or None with the `reason`. `fault` where something failed to answer, `usage`
    what components say it took."""

    record: Mapping[str, Any] | None
    reason: str = ""
    fault: bool = True
    usage: Mapping[str, float] = field(default_factory=dict)


Make = Callable[[List[Row]], list[Outcome]]


@dataclass(frozen=True)
class Kind:
    """A kind of stage: the field that says where a row comes from, and the function that makes it."""

    field: str
    make: Make


def kind_of(config: Making, services: MakingServices, rows: List[Row]) -> Kind:
    """What a configuration asks for of all these rows, ready to work."""
    if isinstance(config, SampleConfig):
        make = _against_own if config.self_play else _candidates
        return Kind("drawn", lambda rows: list(map(make, services.draw(rows, config.n), rows)))
    if isinstance(config, LabelConfig):
        return Kind("judged", Labelling.of(config, services, rows))
    return Kind("revised", Revising.of(config, services))


# --- sample ---------------------------------------------------------------------------------------------------------


def _candidates(rollout: Rollout | None, row: Row) -> Outcome:
    """A demonstration, or several replies of which none is called better."""
    if rollout is None:
        return Outcome(None, TOO_LONG, fault=False)
    texts = [completion.text for completion in rollout.completions]
    if len(texts) == 1:
        return Outcome({**carried(rollout), "completion": texts[0]})
    return Outcome({**carried(rollout), "completions": texts, "ranks": [0] * len(texts)})


def _against_own(rollout: Rollout | None, row: Row) -> Outcome:
    """A comparison of the row's own reply with the one drawn, which is worse."""
    if rollout is None:
        return Outcome(None, TOO_LONG, fault=False)
    own = [reply.text for one in adapt([row], Demonstration) for reply in replies_of(one)]
    drawn = rollout.completions[0].text
    if not own or own[0] == drawn:
        return Outcome(None, ALIKE if own else NONE_OF_ITS_OWN, fault=False)
    return Outcome({**carried(rollout), "chosen": own[0], "rejected": drawn})


# --- label ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelling:
    """Replies, drawn or the row's own, and what a judge says of them."""

    config: LabelConfig
    services: MakingServices
    compare: Comparer
    principles: List[Principle]
    ranked: bool

    @classmethod
    def of(cls, config: LabelConfig, services: MakingServices, rows: List[Row]) -> Labelling:
        judge = config.judge.open(services)
        compare = both_orders(judge) if config.both_orders else in_drawn_order(judge, config.run.seed)
        principles = () if config.constitution is None else read_constitution(config.constitution, compare=True)
        ranked = several(rows) if config.n is None else config.n > 2
        return cls(config, services, compare, principles, ranked)

    def __call__(self, rows: List[Row]) -> list[Outcome]:
        n = self.config.n
        found = [self._item(row) for row in (rows if n is None else self.services.draw(rows, n))]
        verdicts = iter(compared([item for item in found if isinstance(item, Item)], self.compare))
        return [_labelled(item, next(verdicts)) if isinstance(item, Item) else item for item in found]

    def _item(self, row: Row | None) -> Item | Outcome:
        if row is None:
            return Outcome(None, TOO_LONG, fault=False)
        if isinstance(row, Rollout):
            row = replace(row, completions=tuple({c.text: c for c in row.completions}.values()))
            if len(row.completions) < 2:
                return Outcome(None, ALIKE, fault=False)
        return Item.of(self._under_one(row), self.config.pairing, self.ranked)

    def _under_one(self, row: Row) -> Row:
        """The row with the principle its replies are compared by, drawn by its place, if there are any."""
        if not self.principles:
            return row
        one = self.principles[int(self.services.rng("principle", row.index).integers(len(self.principles)))]
        return replace(row, extra={**row.extra, PRINCIPLE: one})


def _labelled(item: Item, verdicts: List[Verdict]) -> Outcome:
    usage, reason = added([verdict.usage for verdict in verdicts]), why_not(verdicts)
    if reason:
        return Outcome(None, reason, usage=usage)
    drawn = principle_of(item.row.extra)
    named = {} if drawn is None else {PRINCIPLE: {"id": drawn.id, "compare": drawn.compare}}
    return Outcome({**item.record(verdicts), **named}, usage=usage)


# --- revise ---------------------------------------------------------------------------------------------------------


@dataclass
class Trail:
    """A draft on its way: the principles of its rounds, and what became of it in those that are over."""

    drawn: Rollout
    principles: List[Principle]
    rounds: list[Revision] = field(default_factory=list)

    @property
    def lost(self) -> bool:
        """Whether a critique or a revision is missing: nothing follows on that."""
        return bool(self.rounds) and self.rounds[-1].reply is None

    @property
    def draft(self) -> str:
        return self.drawn.completions[0].text

    def next(self) -> Draft:
        """What the reviser reads in the next round."""
        now = len(self.rounds)
        reply = self.rounds[-1].reply if self.rounds else self.draft
        return Draft(self.drawn.prompt, reply or "", self.principles[now], f"{self.drawn.index} {now}")

    def outcome(self) -> Outcome:
        """A demonstration of the last reply with all that led to it."""
        usage = added([revision.usage for revision in self.rounds])
        if self.lost:
            return Outcome(None, self.rounds[-1].reason, usage=usage)
        trace = [
            {"principle": principle.id, "critique": revision.critique, "revision": revision.reply}
            for principle, revision in zip(self.principles, self.rounds, strict=True)
        ]
        told = {"completion": self.rounds[-1].reply, "draft": self.draft, "trace": trace}
        return Outcome({**carried(self.drawn), **told, "revised": {"usage": usage}}, usage=usage)


@dataclass(frozen=True)
class Revising:
    """Drafts, criticised and revised by drawn principles, round after round (Bai et al. 2022, arXiv:2212.08073,
    section 3.1)."""

    config: ReviseConfig
    services: MakingServices
    revise: Revise
    principles: List[Principle]

    @classmethod
    def of(cls, config: ReviseConfig, services: MakingServices) -> Revising:
        return cls(config, services, config.reviser.open(services), read_constitution(config.constitution))

    def __call__(self, rows: List[Row]) -> list[Outcome]:
        found = [None if drawn is None else self._trail(drawn) for drawn in self.services.draw(rows, 1)]
        for _ in range(self.config.rounds):
            going = [trail for trail in found if trail is not None and not trail.lost]
            for trail, revision in zip(going, revised(self.revise, [t.next() for t in going]), strict=True):
                trail.rounds.append(revision)
        return [Outcome(None, TOO_LONG, fault=False) if trail is None else trail.outcome() for trail in found]

    def _trail(self, drawn: Rollout) -> Trail:
        """Principles in an order drawn by the row's place, over and over."""
        order = self.services.rng("principles", drawn.index).permutation(len(self.principles))
        places = [int(order[i % len(order)]) for i in range(self.config.rounds)]
        return Trail(drawn, [self.principles[i] for i in places])
