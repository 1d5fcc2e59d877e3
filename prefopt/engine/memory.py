"""Peak memory of a stretch of work, in a process that does many."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Forgets earlier peaks, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        _RESET.write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The most memory in use since `reset_peak`: of the GPU where there is one, else resident memory of this process.

    Where the peak cannot be reset it is the peak since the process began.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    peak = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
    return int(peak) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
