"""Judges that follow a rule: for tests, as floors to beat, and with biases planted on purpose."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Literal, Self

from pydantic import Field, model_validator

from prefopt.api import Completion, Judge, Pair, Rollout, Score, Verdict, show_text
from prefopt_judges.texts import key_of


class Rule(Judge):
    """Prefers by a rule. Where the rule says nothing it is a tie."""

    name = "rule"

    prefer: Literal["longer", "shorter", "contains", "first", "second", "neither"]
    """What is better: the reply with more or fewer characters, with `text` in it, or the one that is shown first or
    second."""
    text: str = ""
    """What a reply is to contain; capitals make no difference."""
    confidence: float = Field(1.0, gt=0.5, le=1)
    """The probability it gives to its preference."""
    first: float = Field(0.0, ge=0, le=1)
    """Share of pairs in which it says instead that the reply shown first is better, drawn by their text: a planted
    position bias of half of that."""

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if (self.prefer == "contains") != bool(self.text):
            raise ValueError("`text` and `prefer: contains` belong together")
        return self

    def compare(self, pairs: List[Pair]) -> list[Verdict]:
        return [self._verdict(pair) for pair in pairs]

    def rate(self, groups: List[Rollout]) -> list[list[Score]]:
        """Characters, or 1 for a reply with the text in it."""
        return [[Score(self._worth(c)) for c in group.completions] for group in groups]

    def _verdict(self, pair: Pair) -> Verdict:
        gap = 1.0 if self._blind(pair) or self.prefer == "first" else -1.0
        if self.prefer not in ("first", "second") and not self._blind(pair):
            gap = self._worth(pair.a) - self._worth(pair.b)
        if gap == 0:
            return Verdict(0.0, tie=1.0)
        return Verdict(self.confidence if gap > 0 else 1 - self.confidence)

    def _blind(self, pair: Pair) -> bool:
        """Whether this pair is one of those judged by their place."""
        key = key_of(show_text(pair.prompt), *sorted((pair.a.text, pair.b.text)))
        return int(key[:8], 16) < self.first * 2**32

    def _worth(self, completion: Completion) -> float:
        text = completion.text
        sign = {"longer": 1, "shorter": -1}.get(self.prefer, 0)
        return float(sign * len(text)) if sign else float(bool(self.text) and self.text.casefold() in text.casefold())
