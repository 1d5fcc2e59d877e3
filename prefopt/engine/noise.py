"""Noise on the vectors of the tokens a model is trained on: NEFTune, Jain et al. 2023, arXiv:2310.05914, algorithm 1.

It knows keys, places and lengths; which forward passes have it is the business of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.data.streams import derive

Change = Callable[[Tensor], Tensor]
"""What becomes of the vectors of the tokens of a forward pass, [n, W, H], a row for each sequence."""


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of one minibatch: that of a sequence depends on `key`, its place and its length, on no padding."""

    alpha: float
    key: int

    def added(self, places: Sequence[int], lengths: Sequence[int], vectors: Tensor) -> Tensor:
        """Vectors [n, W, H] of the sequences at these places of the minibatch, with noise: uniform in [-1, 1] times
        alpha / sqrt(L H) on the L tokens of a sequence, none on padding."""
        noise = torch.zeros_like(vectors)
        for row, place, length in zip(noise, places, lengths, strict=True):
            most = self.alpha / math.sqrt(length * vectors.shape[-1])
            generator = torch.Generator(vectors.device).manual_seed(derive(self.key, place))
            row[:length].uniform_(-most, most, generator=generator)
        return vectors + noise


@contextmanager
def changing(network: Any, change: Change | None) -> Iterator[None]:
    """Forward passes of a network whose embedding gives changed vectors."""
    if change is None:
        yield
        return

    def hook(module: nn.Module, inputs: Any, vectors: Tensor) -> Tensor:
        return change(vectors)

    handle = network.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
