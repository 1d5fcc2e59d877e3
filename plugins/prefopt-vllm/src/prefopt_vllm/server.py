"""A vLLM server of the run's own: how it is started, heard and stopped. It knows processes and addresses; no weights,
no tokens.

It listens on this machine alone. Its control routes ask for no password, which is vLLM's design: whoever may connect
to this machine's own addresses may use them.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from prefopt.api import ServiceError, ToolPath, redact
from prefopt_vllm import keeper

HERE = "127.0.0.1"
PASSED = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")
PASSED_BEGINNINGS = ("CUDA_", "NVIDIA_", "NCCL_", "OMP_", "VLLM_", "LC_")
"""What a server sees of the environment: it has no need of anybody's tokens."""
USUAL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
ALWAYS = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
TAIL = 4000
"""Bytes of the log in which the reason for an end is looked for."""


class Serve(BaseModel):
    """How a server is started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: ToolPath
    """The interpreter of vLLM's environment."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """What it computes in."""
    max_model_len: PositiveInt | None = None
    """The most tokens of a prompt and its completion. Default: what the model can read."""
    args: list[str] = []
    """Further arguments, such as `--gpu-memory-utilization=0.4`."""
    env: dict[str, str] = {}
    """Further environment variables."""
    start_timeout: PositiveFloat = 600.0
    """Seconds until it answers."""


class Server:
    """A running server. `model` is the folder it starts with, `log` the file its output is added to."""

    def __init__(self, settings: Serve, model: Path, log: Path) -> None:
        self.settings, self.log = settings, log
        self.name, self.token, port = f"prefopt-{secrets.token_hex(8)}", secrets.token_hex(16), _free_port()
        self.url = f"http://{HERE}:{port}"
        command = [sys.executable, "-I", keeper.__file__, *self._command(model, port)]
        with open(log, "ab", opener=_private) as out:
            self.process = self._started(command, out.fileno())

    def _started(self, command: list[str], out: int) -> subprocess.Popen[bytes]:
        environment = {**_passed(os.environ), **self.settings.env, **ALWAYS, "VLLM_API_KEY": self.token}
        try:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment)
        except OSError as error:
            raise ServiceError(f"the server cannot be started: {error.strerror}", where="sampler.serve") from None

    def _command(self, model: Path, port: int) -> list[str]:
        own = ["--model", str(model), "--host", HERE, "--port", str(port), "--served-model-name", self.name]
        own += ["--dtype", self.settings.dtype, "--generation-config", "vllm"]
        own += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
        if self.settings.max_model_len is not None:
            own += ["--max-model-len", str(self.settings.max_model_len)]
        return [self.settings.python, "-m", "vllm.entrypoints.openai.api_server", *own, *self.settings.args]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, answers: Callable[[], bool]) -> None:
        """Returns when it `answers`. Raises `ServiceError` when it ends instead, or takes too long."""
        until = time.monotonic() + self.settings.start_timeout
        while not answers():
            if not self.alive:
                raise self._ended("the server ended while it started")
            if time.monotonic() > until:
                raise self._ended(f"the server did not start within {self.settings.start_timeout:g} s")
            time.sleep(0.2)

    def _ended(self, what: str) -> ServiceError:
        lines = self.log.read_bytes()[-TAIL:].decode(errors="replace").splitlines()
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
        fix = "Its log says why; `serve.args` and `serve.env` change how it is started."
        return ServiceError(f"{what}: {redact(reason.strip())[-200:]}", where=str(self.log), fix=fix)

    def stop(self) -> None:
        """Ends it, with all that it started."""
        assert self.process.stdin is not None, "it was opened as a pipe"
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HERE, 0))
        return int(found.getsockname()[1])


def _passed(environment: Mapping[str, str]) -> dict[str, str]:
    own = {k: v for k, v in environment.items() if k in PASSED or k.startswith(PASSED_BEGINNINGS)}
    return {**USUAL, **own}
