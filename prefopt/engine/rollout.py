"""Draws completions through a sampler. Knows rows, requests and keys; how tokens are drawn is the sampler's
business."""

from __future__ import annotations

from collections.abc import Sequence as List

from prefopt.data.render import Renderer
from prefopt.data.streams import derive
from prefopt.rows import Rollout, Row
from prefopt.sampling import Drawer, Request


def draw(drawer: Drawer, renderer: Renderer, rows: List[Row], n: int, *key: str | int) -> list[Rollout]:
    """`n` completions for the prompt of each row that fits. Draw k for row i depends on `key`, i and k alone."""
    prompts = [(row, opening) for row in rows if (opening := renderer.opening(row.prompt)) is not None]
    drawn = dict(drawer([Request(opening, derive(*key, row.index, k)) for row, opening in prompts for k in range(n)]))
    return [
        Rollout(
            prompt=row.prompt,
            index=row.index,
            weight=row.weight,
            extra=row.extra,
            completions=tuple(drawn[i * n + k] for k in range(n)),
        )
        for i, (row, _) in enumerate(prompts)
    ]
