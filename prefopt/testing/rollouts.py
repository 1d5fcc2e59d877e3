"""Samples made up for tests: scored replies for the draws that a method asks for."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefopt.batch import Draw
from prefopt.components import Algorithm, RolloutAlgorithm
from prefopt.rows import Completion, Role, Rollout
from prefopt.testing.tiny import SPECIAL

if TYPE_CHECKING:
    from prefopt.testing.synthetic import Synthetic

FLAT = 4
"""The group whose samples all score the same."""


def rollout(draws: List[Draw], completion: Callable[[], Completion], *, index: int, **shared: Any) -> Rollout:
    """One row: `completion` makes each reply of each draw, and its score. One in three is cut, the first is not; all
    of group 4 score the same."""
    roles = [draw.role for draw in draws or (Draw(3),) for _ in range(draw.n)]
    drawn = [replace(completion(), finished=(index + i) % 3 != 2) for i in range(len(roles))]
    if index == FLAT:
        drawn = [replace(c, score=0.5) for c in drawn]
    return Rollout(**shared, index=index, completions=tuple(drawn), roles=tuple(roles))


def rollouts(draws: List[Draw], size: int, cut: bool = False) -> list[Rollout]:
    """Rows for the tiny model: prompts to count from, and letters as if they had been drawn. With `cut` no completion
    is finished, else two of three are."""
    generator = torch.Generator().manual_seed(0)

    def completion() -> Completion:
        length = int(torch.randint(2, 9, (), generator=generator))
        ids = tuple(torch.randint(len(SPECIAL), 60, (length,), generator=generator).tolist())
        logps = tuple((-4 - torch.rand(length, generator=generator)).tolist())
        score = float(torch.rand((), generator=generator))
        return Completion(" ".join(map(str, ids)), ids=ids, logps=logps, score=score)

    made = [rollout(draws, completion, index=i, prompt=f"count from {i}: ") for i in range(size)]
    if cut:
        made = [replace(row, completions=tuple(replace(c, finished=False) for c in row.completions)) for row in made]
    return made


def in_a_later_pass(algorithm: Algorithm) -> Algorithm:
    """The algorithm with more than one pass over its samples: before, ratios are 1 and nothing is clipped."""
    if isinstance(algorithm, RolloutAlgorithm) and algorithm.on_policy:
        return algorithm.model_copy(update={"inner_epochs": 2})
    return algorithm


def best_and_worst(made: Synthetic) -> dict[str, Tensor]:
    """The places of the best and the worst sample, by score, of each group in which scores differ; of chosen and
    rejected where there are such."""
    role = made.batch.role
    if bool((role == Role.CHOSEN).any()):
        return {r.name.lower(): (role == r).nonzero().squeeze(1) for r in (Role.CHOSEN, Role.REJECTED)}
    if "score" not in made.batch.columns:
        return {"best": torch.arange(len(role))}
    score, groups = made.batch.score, made.batch.group.tolist()
    members = [[i for i, g in enumerate(groups) if g == group] for group in sorted(set(groups))]
    uneven = [own for own in members if len({float(score[i]) for i in own}) > 1]
    ends = {"best": max, "worst": min}
    return {name: torch.tensor([end(own, key=score.__getitem__) for own in uneven]) for name, end in ends.items()}
