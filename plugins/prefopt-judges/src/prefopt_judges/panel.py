"""Several judges as one. They know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from statistics import fmean

from pydantic import Field, PositiveInt

from prefopt.api import Comparer, Judge, Pair, Services, Verdict, added, answered

Join = Callable[[List[Verdict]], Verdict]


class Ensemble(Judge):
    """The mean of what several judges say; missing where one of them says nothing."""

    name = "ensemble"

    members: tuple[Judge, ...] = Field(min_length=2)
    """The judges."""

    @property
    def reads_principles(self) -> bool:
        return all(member.reads_principles for member in self.members)

    def open(self, services: Services) -> Comparer:
        return _joined([member.open(services) for member in self.members], _mean)


class Majority(Judge):
    """The vote of several judges; a draw between the sides is a tie."""

    name = "majority"

    members: tuple[Judge, ...] = Field(min_length=2)
    """The judges, with one vote each."""
    quorum: PositiveInt | None = None
    """How many must vote. Default: more than half of them."""

    @property
    def reads_principles(self) -> bool:
        return all(member.reads_principles for member in self.members)

    def open(self, services: Services) -> Comparer:
        return _joined([member.open(services) for member in self.members], self._vote)

    def _vote(self, verdicts: List[Verdict]) -> Verdict:
        told = [v for v in verdicts if v.value is not None]
        if len(told) < (self.quorum or len(self.members) // 2 + 1):
            return Verdict(None, reason=f"{len(told)} of {len(verdicts)} judges voted: {_why(verdicts)}")
        ballots = [v.ballot for v in told]
        a, b, tie = (sum(ballot[i] for ballot in ballots) for i in range(3))
        won = Verdict(0.0, tie=1.0) if tie > max(a, b) or a == b else Verdict(float(a > b))
        return Verdict(won.a_better, won.tie, votes=(a, b, tie))


def _mean(verdicts: List[Verdict]) -> Verdict:
    told = [(v.a_better, v.tie) for v in verdicts if v.a_better is not None]
    if len(told) < len(verdicts):
        return Verdict(None, reason=f"a member of the ensemble is missing: {_why(verdicts)}")
    a, b, tie = (sum(own) for own in zip(*(v.ballot for v in verdicts), strict=True))
    return Verdict(fmean(p for p, _ in told), fmean(p for _, p in told), votes=(a, b, tie))


def _why(verdicts: List[Verdict]) -> str:
    return next((v.reason for v in verdicts if v.value is None), "the others were not asked")


def _joined(members: List[Comparer], join: Join) -> Comparer:
    def compare(pairs: List[Pair]) -> list[Verdict]:
        found = zip(*(answered(member, pairs) for member in members), strict=True)
        return [_with_usage(join(verdicts), verdicts) for verdicts in found]

    return compare


def _with_usage(verdict: Verdict, members: List[Verdict]) -> Verdict:
    usage = added([member.usage for member in members])
    return Verdict(verdict.a_better, verdict.tie, verdict.reason, verdict.votes, usage)
