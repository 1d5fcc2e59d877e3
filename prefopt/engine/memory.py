"""Memory of a process: what is freed is kept for what comes next, and the peak of a stretch of work."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_LIBC = ctypes.CDLL(None)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed() -> bool:
    """Blocks below `KEPT_BYTES` are not given back to the system when they are freed: to get them again would cost a
    page fault for every 4 KiB, about a tenth of a training step on a CPU. False, and nothing is changed, where the C
    library is not glibc or is too old to allow it."""
    if not hasattr(_LIBC, "mallopt") or not _LIBC.mallopt(_MMAP_THRESHOLD, KEPT_BYTES):
        return False
    return bool(_LIBC.mallopt(_TRIM_THRESHOLD, KEPT_BYTES))


def give_back() -> None:
    """Gives freed memory back to the system, where it allows it: at the end of work that had more than what follows."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    """Gives freed memory back and forgets earlier peaks, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    give_back()
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
