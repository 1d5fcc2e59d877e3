"""The child process that runs a user's reward function: requests come as lines of JSON through a pipe, answers go the
same way through another, and the function can reach neither by reading its input or by printing. It imports nothing but
the standard library and what the function imports.

    python -P worker.py MODULE:FUNCTION MEGABYTES

A limit of 0 MB is none. The first answer is `{"ready": true}` or `{"failed": reason}`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import numbers
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, BinaryIO

LONGEST = 2**24
"""Bytes of an answer."""
MOST = 2**14
"""Numbers in an answer."""
REASON = 300
"""Characters of a reason."""


def main() -> None:
    target, megabytes = sys.argv[1:]
    requests, answers = _private_pipes()
    _limit(int(megabytes) * 2**20)
    function = _loaded(target, answers)
    waiting: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests, waiting), daemon=True).start()
    while True:
        _send(answers, _answer(function, json.loads(waiting.get())))


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes under other numbers. Standard input is then empty, and what is printed goes to standard error."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, answers


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _listen(requests: BinaryIO, waiting: SimpleQueue[bytes]) -> None:
    """Passes requests on. When they end, whoever asked is gone, and so is everything that was started here."""
    for line in requests:
        waiting.put(line)
    os.killpg(0, signal.SIGKILL)


def _loaded(target: str, answers: BinaryIO) -> Callable[..., Any]:
    try:
        function = load(target)
    except BaseException as error:
        _send(answers, {"failed": _said(error)})
        os._exit(1)
    _send(answers, {"ready": True})
    return function


def load(target: str) -> Callable[..., Any]:
    """The function called `module.py:function` or `package.module:function`."""
    place, _, name = target.rpartition(":")
    sys.path.insert(0, os.path.dirname(os.path.abspath(place)) if place.endswith(".py") else os.getcwd())
    found: Any = _module(place)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"`{name}` is no function")
    return found  # type: ignore[no-any-return]


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    name = os.path.basename(place).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _answer(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    try:
        return {"answer": plain(function(*arguments))}
    except NoNumber as error:
        return {"failed": str(error)}
    except BaseException as error:
        return {"failed": _said(error)}


class NoNumber(Exception):
    """A function returned something that is neither a number nor a list of them."""


def plain(value: Any) -> Any:
    """Numbers, None and lists of them as JSON has them; arrays and tensors become lists. Raises `NoNumber` for
    anything else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        if len(value) > MOST:
            raise NoNumber(f"it gave a list of {len(value)}, more than there are completions")
        return [plain(item) for item in value]
    if value is None or isinstance(value, numbers.Real):
        return None if value is None else float(value)
    raise NoNumber(f"it gave a {type(value).__name__} instead of a number")


def _said(error: BaseException) -> str:
    """What went wrong, and in which line."""
    try:
        what = f"{type(error).__name__}: {error}"[:REASON]
    except BaseException:
        what = type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f"{what} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else what


def _send(answers: BinaryIO, message: dict[str, Any]) -> None:
    line = json.dumps(message).encode()
    if len(line) > LONGEST:
        line = json.dumps({"failed": f"its answer is longer than {LONGEST} bytes"}).encode()
    answers.write(line + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
