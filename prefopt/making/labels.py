"""Rows become pairs, verdicts on them become labelled rows. Knows no judge and no file."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

from prefopt.data.streams import derive
from prefopt.errors import DataError
from prefopt.making.lines import carried, replies_of
from prefopt.rows import Completion, Row, show_text
from prefopt.verdicts import Comparer, Pair, Pairing, Verdict, added, answered, places, win_rates


def in_drawn_order(compare: Comparer, seed: int) -> Comparer:
    """The judge asked about each pair in one order, which its texts and the seed decide."""

    def asked(pairs: List[Pair]) -> list[Verdict]:
        turned = [derive(seed, "order", show_text(p.prompt), p.a.text, p.b.text) % 2 == 1 for p in pairs]
        found = answered(compare, [p.turned() if t else p for p, t in zip(pairs, turned, strict=True)])
        return [v.turned() if t else v for v, t in zip(found, turned, strict=True)]

    return asked


def compared(items: List[Item], compare: Comparer) -> list[list[Verdict]]:
    """The verdicts on each item, all asked for at once."""
    verdicts = iter(compare([pair for item in items for pair in item.pairs()]))
    return [[next(verdicts) for _ in item.met] for item in items]


def why_not(verdicts: List[Verdict]) -> str:
    """Why a row has no label: empty when it has one. One missing comparison makes the whole row's missing."""
    return next((v.reason for v in verdicts if v.value is None), "")


@dataclass(frozen=True)
class Item:
    """A row to label: its replies, and which of them meet."""

    row: Row
    replies: tuple[Completion, ...]
    met: tuple[tuple[int, int], ...]
    ranked: bool = False
    """Whether two replies, too, are written as several: the rows of a file have one form."""

    @classmethod
    def of(cls, row: Row, pairing: Pairing, ranked: bool = False) -> Item:
        """Raises `DataError` for a row without two replies."""
        replies = replies_of(row)
        if len(replies) < 2:
            fix = "Write two or more replies for each prompt, as `completions`, or as `chosen` and `rejected`."
            raise DataError("a row without two replies cannot be compared", where=f"data, row {row.index}", fix=fix)
        return cls(row, replies, tuple(places(len(replies), pairing)), ranked)

    def pairs(self) -> list[Pair]:
        return [Pair(self.row.prompt, self.replies[i], self.replies[j], self.row.extra) for i, j in self.met]

    def record(self, verdicts: List[Verdict]) -> dict[str, Any]:
        """The row with its labels: `preference` and `votes` of two replies, `scores` (win rates) of several."""
        shared = carried(self.row)
        judged: dict[str, Any] = {"usage": added([v.usage for v in verdicts])}
        if len(self.replies) == 2 and not self.ranked:
            return {**shared, **self._two(verdicts[0]), "judged": {**judged, "tie": verdicts[0].tie}}
        told = [
            {"places": met, "better": v.a_better, "tie": v.tie, "votes": v.ballot}
            for met, v in zip(self.met, verdicts, strict=True)
        ]
        rates = win_rates(len(self.replies), self.met, verdicts)
        texts = [reply.text for reply in self.replies]
        return {**shared, "completions": texts, "scores": rates, "judged": {**judged, "verdicts": told}}

    def _two(self, verdict: Verdict) -> dict[str, Any]:
        value = 0.5 if verdict.value is None else verdict.value
        turned = verdict.turned() if value < 0.5 else verdict
        sides = self.replies if value >= 0.5 else self.replies[::-1]
        return {
            "chosen": sides[0].text,
            "rejected": sides[1].text,
            "preference": max(value, 1 - value),
            "votes": turned.ballot,
        }
