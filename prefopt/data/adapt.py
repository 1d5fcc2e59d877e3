"""From one kind of row to another: a literal table of pure functions, so that one data set feeds every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any, Final

from prefopt.errors import DataError
from prefopt.rows import Comparison, Completion, Demonstration, Judgement, Prompt, Ranking, Rollout, Row


def adapt(rows: Iterable[Row], kind: type[Row]) -> list[Row]:
    """The rows as rows of `kind`; one row may give several, or none. Raises `DataError` when no adapter leads there."""
    return [new for row in rows for new in _adapter(type(row), kind)(row)]


def adaptable(source: type[Row], kind: type[Row]) -> bool:
    """Whether rows of `source` can become rows of `kind`."""
    return source is kind or (source, kind) in ADAPTERS


def require(source: type[Row], kind: type[Row]) -> None:
    """Raises `DataError` when rows of `source` cannot become rows of `kind`."""
    _adapter(source, kind)


def _adapter(source: type[Row], kind: type[Row]) -> Callable[[Any], list[Row]]:
    if source is kind:
        return lambda row: [row]
    if (source, kind) not in ADAPTERS:
        ways = ", ".join(to.kind for start, to in ADAPTERS if start is source)
        raise DataError(f"a {source.kind} cannot become a {kind.kind}", fix=f"It can become: {ways}." if ways else "")
    return ADAPTERS[source, kind]


def _shared(row: Row) -> dict[str, Any]:
    return {"prompt": row.prompt, "index": row.index, "weight": row.weight, "extra": row.extra}


def _to_prompt(row: Row) -> list[Row]:
    return [Prompt(**_shared(row))]


def _demonstrate(row: Row, completion: Completion) -> list[Row]:
    return [Demonstration(**_shared(row), completion=completion)]


def _judge(row: Row, completion: Completion, desirable: bool) -> Row:
    return Judgement(**_shared(row), completion=completion, desirable=desirable)


# --- comparisons ----------------------------------------------------------------------------------------------------


def _comparison_to_judgements(row: Comparison) -> list[Row]:
    """Chosen is desirable, rejected is not; a tie says nothing."""
    if row.preference == 0.5:
        return []
    return [_judge(row, row.chosen, True), _judge(row, row.rejected, False)]


def _comparison_to_demonstration(row: Comparison) -> list[Row]:
    return [] if row.preference == 0.5 else _demonstrate(row, row.chosen)


# --- rankings -------------------------------------------------------------------------------------------------------


def _ranking_to_comparisons(row: Ranking) -> list[Row]:
    """Every pair, the better first; with votes, the share of raters who agree is the preference; with scores, their
    difference is the margin."""
    return [_compare(row, i, j) for i, j in combinations(range(len(row.ranks)), 2)]


def _compare(row: Ranking, i: int, j: int) -> Row:
    if row.ranks[j] < row.ranks[i]:
        i, j = j, i
    prefer: float = 0.5 if row.ranks[i] == row.ranks[j] else 1.0
    counts = [sum(_sign(v[i], v[j]) == s for v in row.votes) for s in (1, -1, 0)]
    if row.votes:
        prefer = (counts[0] + counts[2] / 2) / len(row.votes)
    above, below = row.completions[i].score, row.completions[j].score
    return Comparison(
        **_shared(row),
        margin=None if above is None or below is None else above - below,
        chosen=row.completions[i],
        rejected=row.completions[j],
        preference=prefer,
        votes=(counts[0], counts[1], counts[2]) if row.votes else None,
    ).upright()


def _sign(a: int, b: int) -> int:
    return (a < b) - (a > b)


def _ranking_to_judgements(row: Ranking) -> list[Row]:
    """Above the mean place is desirable, below it is not, at it says nothing."""
    mean = sum(row.ranks) / len(row.ranks)
    pairs = zip(row.completions, row.ranks, strict=True)
    return [_judge(row, c, rank < mean) for c, rank in pairs if rank != mean]


def _ranking_to_demonstration(row: Ranking) -> list[Row]:
    return _demonstrate(row, row.completions[row.ranks.index(min(row.ranks))])


# --- judgements and rollouts ----------------------------------------------------------------------------------------


def _judgement_to_demonstration(row: Judgement) -> list[Row]:
    return _demonstrate(row, row.completion) if row.desirable else []


def _scored(row: Rollout) -> list[tuple[float, Completion]]:
    """Completions with a score, best first; equal scores keep their order."""
    return sorted(((c.score, c) for c in row.completions if c.score is not None), key=lambda pair: -pair[0])


def _rollout_to_ranking(row: Rollout) -> list[Row]:
    scored = _scored(row)
    if len(scored) < 2:
        return []
    places = sorted({score for score, _ in scored}, reverse=True)
    ranks = tuple(places.index(score) for score, _ in scored)
    return [Ranking(**_shared(row), completions=tuple(c for _, c in scored), ranks=ranks)]


def _rollout_to_comparison(row: Rollout) -> list[Row]:
    """The best against the worst, with the difference of their scores as margin; equal scores are dropped, and so are
    equal completions."""
    scored = _scored(row)
    if len(scored) < 2:
        return []
    (high, best), (low, worst) = scored[0], scored[-1]
    same = best.text == worst.text and best.ids == worst.ids
    if high == low or same:
        return []
    return [Comparison(**_shared(row), chosen=best, rejected=worst, margin=high - low)]


def _rollout_to_judgements(row: Rollout) -> list[Row]:
    """Above the mean score is desirable, below it is not."""
    scored = _scored(row)
    mean = sum(score for score, _ in scored) / max(len(scored), 1)
    return [_judge(row, c, score > mean) for score, c in scored if score != mean]


def _rollout_to_demonstration(row: Rollout) -> list[Row]:
    scored = _scored(row)
    return _demonstrate(row, scored[0][1]) if scored else []


ADAPTERS: Final[Mapping[tuple[type[Row], type[Row]], Callable[[Any], list[Row]]]] = {
    (Ranking, Comparison): _ranking_to_comparisons,
    (Ranking, Judgement): _ranking_to_judgements,
    (Ranking, Demonstration): _ranking_to_demonstration,
    (Comparison, Judgement): _comparison_to_judgements,
    (Comparison, Demonstration): _comparison_to_demonstration,
    (Judgement, Demonstration): _judgement_to_demonstration,
    (Rollout, Ranking): _rollout_to_ranking,
    (Rollout, Comparison): _rollout_to_comparison,
    (Rollout, Judgement): _rollout_to_judgements,
    (Rollout, Demonstration): _rollout_to_demonstration,
    **{(kind, Prompt): _to_prompt for kind in (Demonstration, Comparison, Ranking, Judgement, Rollout)},
}
