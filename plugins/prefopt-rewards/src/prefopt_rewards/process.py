"""A child process that answers questions, one line for a line, and is killed when it takes too long. It knows pipes and
deadlines, not what the lines say."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as List
from typing import IO

CHUNK = 2**16
LONGEST = 2**25
"""Bytes of an answer."""
SHOWN = 2**14
"""Bytes of what a process prints that are shown, for each question."""


class Lost(Exception):
    """The process gave no answer; the message says why. It is gone, and the next question starts another."""


class Process:
    """A process started when it is first asked, in a session of its own: what it starts dies with it."""

    def __init__(self, command: List[str], environment: Mapping[str, str]) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._running: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes]], Process] | None = None

    @property
    def running(self) -> bool:
        """Whether there is a process; a new one says something before it is asked."""
        return self._running is not None

    def start(self, until: float) -> bytes:
        """Starts the process and returns the line it begins with."""
        self._running = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _kill, self._running)
        return self.ask(b"", until)

    def ask(self, question: bytes, until: float) -> bytes:
        """The line it answers with before the clock (`time.monotonic`) shows `until`. Raises `Lost`."""
        assert self._running is not None
        try:
            return _Exchange(self._running, question, until).answer()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kills it and all it has started."""
        self._running = None
        if self._end is not None:
            self._end()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class _Exchange:
    """One question and its answer."""

    def __init__(self, process: subprocess.Popen[bytes], question: bytes, until: float) -> None:
        self.process, self.until = process, until
        self.unsent, self.heard, self.shown = memoryview(question), bytearray(), 0

    def answer(self) -> bytes:
        process = self.process
        with selectors.DefaultSelector() as pipes:
            for pipe, handle in ((process.stdout, self._read), (process.stderr, self._show)):
                self._watch(pipes, pipe, selectors.EVENT_READ, handle)
            if self.unsent:
                self._watch(pipes, process.stdin, selectors.EVENT_WRITE, self._write)
            while not self.heard.endswith(b"\n"):
                left = self.until - time.monotonic()
                if left <= 0:
                    raise Lost("it took longer than the deadline and was killed")
                for key, _ in pipes.select(left):
                    if not key.data(key.fd):
                        pipes.unregister(key.fd)
        return bytes(self.heard)

    def _watch(self, pipes: selectors.BaseSelector, pipe: IO[bytes] | None, event: int, handle: object) -> None:
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        pipes.register(pipe.fileno(), event, handle)

    def _write(self, fd: int) -> bool:
        """Whether there is more to send."""
        try:
            self.unsent = self.unsent[os.write(fd, self.unsent[:CHUNK]) :]
        except BrokenPipeError:
            return False
        return len(self.unsent) > 0

    def _read(self, fd: int) -> bool:
        chunk = os.read(fd, CHUNK)
        if not chunk:
            raise Lost(self._ended())
        self.heard += chunk
        if len(self.heard) > LONGEST:
            raise Lost(f"its answer is longer than {LONGEST} bytes")
        return True

    def _show(self, fd: int) -> bool:
        """Passes on what the process prints, without control characters and only the beginning of much."""
        chunk = os.read(fd, CHUNK)
        text = chunk[: max(0, SHOWN - self.shown)].decode("utf-8", "replace")
        self.shown += len(chunk)
        sys.stderr.write("".join(c for c in text if c.isprintable() or c in "\n\t"))
        return bool(chunk)

    def _ended(self) -> str:
        try:
            code = self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            return "its process closed the pipe to this one"
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process ended by itself, with exit code {code}"
