"""Gradient checkpointing: layers keep only their inputs and compute the rest again in the backward pass.

Chen et al. 2016, arXiv:1604.06174. One more forward pass of the layers, for memory that no longer grows with what is
inside them. transformers checkpoints layers in training mode only, which would also switch dropout on: here the mode is
set on the layers alone, and is over before what is inside them runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.errors import ConfigError


def prepare(network: nn.Module) -> list[nn.Module]:
    """The layers that will be computed again, made ready for it."""
    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(network).__name__} has no layers that can be computed again",
            where="optim.gradient_checkpointing",
            fix="Set it to false.",
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_run, layer)
    return layers


def _run(layer: Any, run: Callable[..., Any], *inputs: Any) -> Any:
    layer.training = False
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), layer.computed_again()))


@contextmanager
def recomputing(layers: list[nn.Module], again: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A forward pass whose layers keep their inputs only, when gradients are on. They are computed `again` within what
    this pass is computed in."""
    if not torch.is_grad_enabled():
        yield
        return
    for layer in layers:
        layer.training = True
        layer.computed_again = again  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
