"""Rewards for the shape of a reply: how long it is and how much it repeats itself. Nothing here reads its meaning."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Any, Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from prefopt.api import Completion, Rollout
from prefopt_rewards.scores import Unscorable, Verifier, column, number

Unit = Literal["tokens", "words", "characters"]


def units(completion: Completion, unit: Unit) -> List[Any]:
    """A reply in pieces. Raises `Unscorable` where tokens are asked of one that was not sampled."""
    if unit == "tokens" and completion.ids is None:
        raise Unscorable("it has no tokens, for it was not sampled: count words or characters")
    return {"tokens": completion.ids or (), "words": completion.text.split(), "characters": completion.text}[unit]


class Length(Verifier):
    """1 for a reply of the right length, less for one that is too short or too long."""

    name = "length"

    unit: Unit = "tokens"
    """What is counted: tokens (with the one that ends the reply), words or characters."""
    minimum: NonNegativeInt = 0
    """The shortest right length."""
    maximum: PositiveInt | None = None
    """The longest right length."""
    column: str = ""
    """The column with the row's own longest right length, instead of `maximum`."""
    margin: NonNegativeInt = 0
    """Over how many units more, or fewer, the reward falls to 0 in a straight line."""

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.column and self.maximum is not None:
            raise ValueError("write either `maximum` or `column`")
        if not self.column and self.maximum is None and not self.minimum:
            raise ValueError("write `minimum`, `maximum` or `column`")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError("`maximum` is below `minimum`")
        return self

    def value(self, completion: Completion, row: Rollout) -> float:
        size = len(units(completion, self.unit))
        limit = number(column(row, self.column)) if self.column else self.maximum
        outside = max(self.minimum - size, 0 if limit is None else size - limit, 0)
        return max(0.0, 1 - outside / (self.margin + 1))


class Repetition(Verifier):
    """Minus the share of n-grams of a reply that occurred in it before: 0 for one without repetition, near -1 for one
    that says the same all over."""

    name = "repetition"

    n: PositiveInt = 3
    """The size of an n-gram."""
    unit: Unit = "words"
    """What n-grams are made of."""

    def value(self, completion: Completion, row: Rollout) -> float:
        pieces = units(completion, self.unit)
        grams = [tuple(pieces[i : i + self.n]) for i in range(len(pieces) - self.n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0
