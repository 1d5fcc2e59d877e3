"""What both sides of the comparison share: a process that trains some steps when told to, and says how it went.

Lines on standard input are `steps N`; each is answered by one line of JSON: seconds, losses and gradient norms of the
steps, what the reference took, and the speed of a matrix product measured just before. The end of input ends the
process with its peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

import torch

PROMPTS, SAMPLES, TOKENS = 4, 8, 64
"""A step of a method that samples: no completion ends before its last token."""
BETA = {"grpo": 0.0, "rloo": 0.05}
"""Methods that sample, and the price of a nat of KL divergence: what TRL takes unless told otherwise."""


@dataclass
class Steps:
    """The steps of one answer. Before them, the reference goes over their rows once, where it does not in the steps:
    `reference_seconds` for each of them."""

    reference_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    reused: list[float] = field(default_factory=list)


def orders() -> Iterator[int]:
    """How many steps to train, order by order."""
    for line in sys.stdin:
        yield int(line.removeprefix("steps "))


def answer(**found: object) -> None:
    """One line of JSON on the real standard output."""
    sys.__stdout__.write(json.dumps(found) + "\n")
    sys.__stdout__.flush()


def rows_of(method: str) -> str:
    """The file of the workload that a method reads, without its suffix."""
    return "prompts" if method in BETA else "judgements" if method == "kto" else "pairs"


def versions() -> dict[str, str]:
    """What this process is made of."""
    found = {dist.metadata["Name"].lower(): dist.version for dist in distributions()}
    return {name: found[name] for name in ("prefopt", "trl", "torch", "transformers") if name in found}


def roof(dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of the workload's own matrix product, [1024, 512] x [512, 1344], the best of several."""
    a, b = torch.randn(1024, 512, dtype=dtype), torch.randn(1344, 512, dtype=dtype)
    best = min(_timed(lambda: [a @ b.T for _ in range(20)]) for _ in range(5))
    return 20 * 2 * 1024 * 512 * 1344 / best / 1e9


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_mb() -> float:
    """The most memory this process has had resident, in MB; nothing of its parent's, as `getrusage` would have it."""
    return _status("VmHWM")


def resident_mb() -> float:
    """The memory this process has resident now, in MB."""
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
