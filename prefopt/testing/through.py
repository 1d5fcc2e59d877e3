"""Properties of an algorithm that are seen in the engine alone, with a model of two layers: one that never met the
engine would not count."""

from __future__ import annotations

from math import isfinite

import torch

from prefopt.components import Algorithm
from prefopt.rows import Role, Rollout
from prefopt.testing.engine import Rows, Trial, Unused, largest_gap, trial
from prefopt.testing.failure import require


def engine_fast_path(algorithm: Algorithm) -> None:
    """Shared prompts and a tiled head give the loss and the gradient of separate rows and whole logits."""
    _alike(algorithm, trial(algorithm, forward="plain"), trial(algorithm), 1e-5, "with the fast path")


def engine_microbatches(algorithm: Algorithm) -> None:
    """A step cut into many microbatches has the loss, metrics and gradient of a whole one."""
    _alike(algorithm, trial(algorithm), trial(algorithm, token_budget=60), 1e-5, "in many microbatches")


def engine_ranks(algorithm: Algorithm) -> None:
    """Two processes give the loss, metrics and gradient of one. (Not for a class of a script or a function.)"""
    if "<locals>" in type(algorithm).__qualname__ or type(algorithm).__module__ == "__main__":
        return
    _alike(algorithm, trial(algorithm), trial(algorithm, ranks=2), 1e-5, "on two processes")


def engine_bfloat16(algorithm: Algorithm) -> None:
    """In bfloat16 the loss is that of float32 within 5 %, and the gradient points the same way."""
    one, other = trial(algorithm), trial(algorithm, precision="bfloat16")
    gap = abs(one.metrics["loss/total"] - other.metrics["loss/total"])
    near = gap <= 0.05 * max(1.0, abs(one.metrics["loss/total"]))
    require(near, f"in bfloat16 the loss is {other.metrics['loss/total']:.4g}, not {one.metrics['loss/total']:.4g}")
    cosine = torch.nn.functional.cosine_similarity(one.flat, other.flat, dim=0)
    require(bool(cosine > 0.5), f"in bfloat16 the gradient points elsewhere (cosine {float(cosine):.3f})")


def engine_order(algorithm: Algorithm) -> None:
    """The order of the rows of a step changes nothing. (Not where a row's probe is made of its neighbours, or random
    numbers are drawn for rows.)"""
    probing = {Role.PROBE} in map(set, algorithm.needs().columns.values())
    if not probing and not (usual := trial(algorithm)).drew:
        _alike(algorithm, usual, trial(algorithm, rows=Rows(turned=True)), 1e-5, "with its rows turned round")


def engine_sizes(algorithm: Algorithm) -> None:
    """A step of one row and of three rows is finite, and so is one whose rows are all cut short, if it uses them."""
    for rows, what in ((Rows(1), "one row"), (Rows(3), "three rows"), (Rows(3, cut=True), "rows cut short")):
        try:
            found = trial(algorithm, rows=rows)
        except Unused:
            require(rows.cut, f"nothing is made of {what}")
            continue
        for name, x in found.metrics.items():
            require(isfinite(x), f"{name} of {what} is {x}")
        require(bool(found.flat.isfinite().all()), f"the gradient of {what} is not finite")


def engine_start(algorithm: Algorithm) -> None:
    """Where the policy is the reference the loss is `loss_at_init`. (Not of samples: these were drawn by neither.)"""
    expected = None if algorithm.eats is Rollout else algorithm.loss_at_init()
    if expected is not None:
        loss = trial(algorithm, rows=Rows(at_reference=True)).metrics["loss/total"]
        close = abs(loss - expected) <= 1e-5 * max(1.0, abs(expected))
        require(close, f"the loss where the policy is the reference is {loss:.8g}, not {expected:.8g}")


def _alike(algorithm: Algorithm, one: Trial, other: Trial, tolerance: float, how: str) -> None:
    for name, x in one.metrics.items():
        near = abs(x - other.metrics[name]) <= tolerance * max(1.0, abs(x))
        require(near, f"{how}, {name} is {other.metrics[name]:.8g}, not {x:.8g}")
    require(bool(one.flat.abs().max() > 0), "the model gets no gradient at all")
    gap = largest_gap(one, other)
    require(gap <= tolerance, f"{how}, the gradient differs by {gap:.2g} of its largest element")
