"""Steps of rows in slots that are recorded once and played again, as CUDA graphs: a step is then one call, where a
model in Python makes thousands. Knows slots and tokens; what records is told from outside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from prefopt.engine.slots import BLOCK, Layer, Slots

WIDTH, ROWS = 2 * BLOCK, 16
"""Recorded steps see so many columns or a multiple, and have a power of two of rows up to so many or a multiple."""
Play: TypeAlias = Callable[[], object]
Recorder: TypeAlias = Callable[[Play], Play]
"""Gives what does again what a call does, on the same tensors and without Python; the call itself may be left out."""


def cuda_graphs(device: torch.device) -> Recorder:
    """Records CUDA graphs that share their memory: they are played one after the other."""
    pool, aside = torch.cuda.graph_pool_handle(), _aside(device)

    def record(run: Play) -> Play:
        graph = torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            graph.capture_begin(pool, capture_error_mode="thread_local")  # rewards may compute in another thread
            try:
                run()
            finally:
                graph.capture_end()
        return graph.replay

    return record


@lru_cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Where graphs of a device are recorded; one for all, for products keep memory for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def tried_graphs(device: torch.device) -> Recorder:
    """The same, for models that may not allow it: what waits for the device or takes numbers of the host is found in a
    run before, for a recording that breaks off leaves PyTorch's memory in disorder. Only while nothing else uses the
    device."""
    record = cuda_graphs(device)

    def tried(run: Play) -> Play:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(action="ignore"):  # that it is experimental
            try:
                torch.cuda.set_sync_debug_mode("error")
                run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return record(run)

    return tried


class Graphed(Slots):
    """Implements `prefopt.sampling.Arena` with recorded steps, one for each number of rows and of columns, rounded up.
    Rows beyond those asked for write into a column that no row sees."""

    def __init__(
        self,
        network: Any,
        slots: int,
        prompt: int,
        room: int,
        whole: int | None = None,
        recorder: Callable[[torch.device], Recorder] = cuda_graphs,
    ) -> None:
        self.seen = _multiple(prompt + room if whole is None else whole, BLOCK)
        """Columns that rows see; the one behind them is nobody's."""
        super().__init__(network, slots, prompt, room, whole, fast=False)
        self.tokens, self.positions, self.columns = torch.zeros(3, slots, dtype=torch.long, device=self.device)
        self.logits: Tensor | None = None
        self.record = recorder(self.device)
        self.steps: dict[tuple[int, ...], Play | None] = {}
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
        self.positions[n:].fill_(0)  # they see something: what is no number stays out
        self.columns[n:].fill_(self.seen)
        self._step(min(_rows(n), len(self.tokens)), min(_multiple(width, WIDTH), self.seen))
        assert self.logits is not None
        return self.logits[:n].clone()

    def _step(self, *size: int) -> None:
        """A step of so many rows and columns. The first is computed as it is, which makes everything ready; the second
        is recorded."""
        compute = partial(self._compute, *size)
        if size not in self.steps:
            self.steps[size] = None
            compute()
            return
        self.steps[size] = play = self.steps[size] or self.record(compute)
        play()

    def _compute(self, rows: int, width: int) -> None:
        self._pass("extend", torch.arange(rows, device=self.device), self.columns[:rows], width)
        found = self._logits(self.tokens[:rows], self.positions[:rows], torch.arange(width, device=self.device))
        if self.logits is None:
            self.logits = found.new_empty(len(self.tokens), found.shape[1])
        self.logits[:rows] = found


def _multiple(n: int, of: int) -> int:
    """`n` rounded up to it; attention of some kinds wants a mask as wide as a multiple of eight."""
    return -(-n // of) * of


def _rows(n: int) -> int:
    """How many rows a step for `n` of them is recorded with.

    >>> [_rows(n) for n in (1, 3, 9, 16, 17, 33)]
    [1, 4, 16, 16, 32, 48]
    """
    return 1 << (n - 1).bit_length() if n <= ROWS else _multiple(n, ROWS)
