"""Steps of rows in slots that are recorded once and played again, as CUDA graphs: a step is then one call, where a
model in Python makes thousands. Knows slots and tokens; what records is told from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from prefopt.engine.slots import BLOCK, Layer, Slots

NARROWEST = 2 * BLOCK
"""Columns that the narrowest recorded step sees; the others see twice as many as the one before."""
Play: TypeAlias = Callable[[], Tensor]
Recorder: TypeAlias = Callable[[Play], Play]
"""Runs something once, and gives what does it again on the same tensors, without Python."""


def cuda_graphs() -> Recorder:
    """Records CUDA graphs that share their memory: they are played one after the other."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Play) -> Play:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # rewards may compute meanwhile
            found = run()

        def play() -> Tensor:
            graph.replay()
            return found

        return play

    return record


class Graphed(Slots):
    """Implements `prefopt.sampling.Arena` with recorded steps, each for a number of rows and of columns: powers of two,
    or all there are. Rows beyond those asked for write into a column that no row sees."""

    def __init__(
        self,
        network: Any,
        slots: int,
        prompt: int,
        room: int,
        whole: int | None = None,
        recorder: Callable[[], Recorder] = cuda_graphs,
    ) -> None:
        self.seen = _rounded(prompt + room if whole is None else whole)
        """Columns that rows see; the one behind them is nobody's."""
        super().__init__(network, slots, prompt, room, whole, fast=False)
        self.tokens, self.positions, self.columns = torch.zeros(3, slots, dtype=torch.long, device=self.device)
        self.record = recorder()
        self.steps: dict[tuple[int, int], Play | None] = {}
        """By rows and columns; None for a step that was computed but not recorded yet."""

    @staticmethod
    def serves(network: Any) -> bool:
        """Whether this can be for the network."""
        return bool(network.get_input_embeddings().weight.device.type == "cuda")

    def _layer(self, slots: int, prompt: int, room: int, whole: int | None) -> Layer:
        return Layer(slots, self.seen + 1)

    @torch.no_grad()
    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        n = len(tokens)
        self.tokens[:n], self.positions[:n], self.columns[:n] = tokens, positions, positions
        self.positions[n:].fill_(0)
        self.columns[n:].fill_(self.seen)
        size = _power(n, 1, len(self.tokens)), _power(width, NARROWEST, self.seen)
        return self._stepped(size)[:n].clone()

    def _stepped(self, size: tuple[int, int]) -> Tensor:
        """A step of this size. The first is computed as it is, which makes everything ready; the second is recorded."""
        if size not in self.steps:
            self.steps[size] = None
            return self._computed(*size)
        play = self.steps[size] or self.record(partial(self._computed, *size))
        self.steps[size] = play
        return play()

    def _computed(self, rows: int, width: int) -> Tensor:
        self._pass("extend", torch.arange(rows, device=self.device), self.columns[:rows], width)
        return self._logits(self.tokens[:rows], self.positions[:rows], torch.arange(width, device=self.device))


def _rounded(columns: int) -> int:
    """As many, up to a whole number of blocks: attention of some kinds wants a mask of such a width."""
    return -(-columns // BLOCK) * BLOCK


def _power(n: int, least: int, most: int) -> int:
    """`n` rounded up to a power of two times `least`, and not beyond `most`.

    >>> [_power(n, 1, 6) for n in range(1, 7)]
    [1, 2, 4, 4, 6, 6]
    """
    return min(most, least << max(0, (-(-n // least) - 1).bit_length()))
