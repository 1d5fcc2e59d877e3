"""Keeps a server alive for as long as whoever started it. Run as a script, `keeper.py COMMAND...`, with the standard
library alone.

The command gets a process group of its own. When the keeper's standard input ends, because its other end was closed or
whoever held it is dead, however it died, the whole group is stopped: asked first, killed ten seconds later.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

GRACE = 10.0
LOOK = 0.5
PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Returns the command's exit status, or 0 when it was stopped because nobody wants it any more."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_bound)
    try:
        while server.poll() is None:
            if select.select([sys.stdin], [], [], LOOK)[0] and not os.read(sys.stdin.fileno(), 1):
                return 0
        return server.returncode
    finally:
        stop(server)


def _bound() -> None:
    """The server hears the signals that its keeper does not, and on Linux dies when its keeper is killed."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ends the server and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
