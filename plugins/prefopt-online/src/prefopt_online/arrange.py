"""From the samples of a prompt to what a loss sees: numbers from other samples, pairs of better and worse."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import replace
from typing import Any

from prefopt.api import Comparison, Completion, Role, Rollout, Row, Sequence


def rollouts(rows: List[Row]) -> Iterator[tuple[int, Rollout]]:
    """Each row with its place, which is the number of its group."""
    for group, row in enumerate(rows):
        assert isinstance(row, Rollout), f"a {row.kind} came where samples were to be"
        yield group, row


def samples(row: Rollout, group: int) -> list[Sequence]:
    """The row's sequences without its opponents."""
    return [sequence for sequence in row.sequences(group) if sequence.role == Role.SAMPLE]


def with_fields(sequence: Sequence, **fields: float | None) -> Sequence:
    """The sequence with more numbers of its row; None is left out."""
    return replace(sequence, fields={**sequence.fields, **{k: x for k, x in fields.items() if x is not None}})


def pair(row: Rollout, group: int, one: Completion, other: Completion) -> list[Sequence]:
    """Two completions as chosen and rejected, by their scores. Nothing where one has none."""
    if one.score is None or other.score is None:
        return []
    chosen, rejected = (one, other) if one.score >= other.score else (other, one)
    shared: dict[str, Any] = {"prompt": row.prompt, "index": row.index, "weight": row.weight, "extra": row.extra}
    sequences = Comparison(**shared, chosen=chosen, rejected=rejected).sequences(group)
    return [with_fields(s, score=c.score) for s, c in zip(sequences, (chosen, rejected), strict=True)]


def preferred(row: Rollout, group: int, one: Completion, other: Completion) -> list[Sequence]:
    """The same; nothing where scores are equal, or both completions are the same."""
    return [] if one.score == other.score or _tokens(one) == _tokens(other) else pair(row, group, one, other)


def _tokens(completion: Completion) -> object:
    return completion.text if completion.ids is None else completion.ids


def best_and_worst(row: Rollout) -> tuple[Completion, Completion] | None:
    """The samples of highest and of lowest score, the first of several; None without samples that have one."""
    scored = [c for c in row.of(Role.SAMPLE) if c.score is not None]
    if not scored:
        return None
    return max(scored, key=_score), min(scored, key=_score)


def _score(completion: Completion) -> float:
    assert completion.score is not None
    return completion.score
