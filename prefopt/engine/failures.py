"""What the machine refuses, as errors with advice. Knows nothing about what a run was doing."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from safetensors import SafetensorError

from prefopt.errors import ResourceError

ROOM: Final = "Make room there; `prefopt resume` then continues from the last checkpoint."
RIGHTS: Final = "Check who may write there; `prefopt resume` then continues from the last checkpoint."
MEMORY: Final = "Lower optim.token_budget or data.max_length; `prefopt resume` continues where it stopped."
ADVICE: Final = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), RIGHTS),
    errno.EIO: "The disk may be failing.",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`).",
    errno.ENOMEM: MEMORY,
}
_OUT_OF_MEMORY: Final = re.compile(r"out of memory|can't allocate memory|not enough memory")
_CODE: Final = re.compile(r"os error (\d+)")


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turns a full disk, a lack of rights or of memory into a `ResourceError`; `place` is where the run writes."""
    try:
        yield
    except OSError as error:
        raise _disk(error, error.errno, error.filename or place) from error
    except SafetensorError as error:
        code = _CODE.search(str(error))
        raise _disk(error, int(code[1]) if code else None, place) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        what = str(error).partition("\n")[0] or "not enough"
        raise ResourceError(f"memory ran out: {what}", where=place, fix=MEMORY) from error


def _disk(error: Exception, code: int | None, place: str) -> Exception:
    """The error that says what to do, or the same error where nobody could say."""
    if code not in ADVICE:
        return error
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return ResourceError(f"the machine refused: {reason}", where=str(place), fix=ADVICE[code])
