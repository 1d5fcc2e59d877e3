from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from prefopt.engine.failures import explained
from prefopt.errors import ResourceError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/runs/x/metrics.jsonl"),
            "/runs/x/metrics.jsonl: .*denied",
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "runs/x: .*No space left"),
        (MemoryError(), "memory ran out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
    ],
)
def test_what_the_machine_refuses_is_a_resource_error(error, words):
    with pytest.raises(ResourceError, match=words), explained("runs/x"):
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "gone"), RuntimeError("a bug"), SafetensorError("x")]
)
def test_anything_else_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught, explained("runs/x"):
        raise error
    assert caught.value is error
