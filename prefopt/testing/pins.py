"""Numbers of an algorithm, kept in a file of its plugin: they change only on purpose. It does not know which are
right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from torch import Tensor

from prefopt.components import Algorithm
from prefopt.testing.kit import direction, evaluate, later
from prefopt.testing.settings import instance, label, others

MANY = 90
"""Groups of the batch that is pinned: enough for what counts rows, or draws some of them."""


def pinned(path: Path, *algorithms: type[Algorithm] | Algorithm) -> Callable[..., None]:
    """A pytest test that what `pin` says of each is what `path` has kept of it: numbers change only on purpose.
    `PREFOPT_PIN=1 pytest ...` writes the file."""
    import pytest

    found = {label(a): pin(instance(a)) for a in algorithms} if os.environ.get("PREFOPT_PIN") else None
    if found is not None:
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")

    @pytest.mark.parametrize("algorithm", algorithms, ids=label)
    def test(algorithm: type[Algorithm] | Algorithm) -> None:
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        assert pin(instance(algorithm)) == pytest.approx(kept.get(label(algorithm)), rel=1e-9), str(path)

    return test


def pin(algorithm: Algorithm) -> dict[str, float]:
    """A third step on a fixed batch: loss, gradient along a fixed direction, metrics, what `prepare` records, says and
    leaves in its state; and the loss of a smaller batch at two other values of each setting."""
    state: dict[str, Tensor] = {}
    made = later(algorithm, state, groups=MANY)
    loss, slopes = evaluate(algorithm, made)
    kept = {f"state {name}": _along(x.double()) for name, x in sorted(state.items())}
    measured = {**{name: x.item() for name, x in loss.metrics.items()}, **made.recorded}
    metrics = dict(sorted(measured.items()))
    gradient = {f"d/d {name}": _along(x) for name, x in sorted(slopes.items())}
    return {"loss": loss.value.item(), **gradient, **metrics, **kept, **dict(_elsewhere(algorithm))}


def _along(x: Tensor) -> float:
    return float((x * direction(x)).sum())


def _elsewhere(algorithm: Algorithm) -> Iterator[tuple[str, float]]:
    """The loss at two other values of each setting."""
    for name in type(algorithm).model_fields:
        for other in islice(others(algorithm, name), 2):
            yield f"loss with {name}={getattr(other, name)}", evaluate(other, later(other, {}))[0].value.item()
