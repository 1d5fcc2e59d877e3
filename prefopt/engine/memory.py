"""Peak memory of a stretch of work, in a process that does many."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_LIBC = ctypes.CDLL(None)


def reset_peak(device: torch.device) -> None:
    """Gives freed memory back and forgets earlier peaks, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
    try:
        _RESET.write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since `reset_peak`: of a GPU its own, of the CPU what this process has resident.

    Where the peak cannot be reset it is the peak since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    peak = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
    return int(peak) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
