"""A user's Python function as a reward. It runs in child processes, which are killed when they take too long and
replaced when they die. This keeps a run going through mistakes; it is no sandbox for code one does not trust."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as List
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PositiveFloat, PositiveInt

from prefopt.api import ConfigError, RewardSource, Rollout, Score, Scorer, Services, Text
from prefopt_rewards.process import Lost, Process
from prefopt_rewards.scores import Unscorable, scores

PASSED = (
    *("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"),
)
"""The environment variables that every function sees. Secrets are not among them."""


def _target(written: str) -> str:
    place, colon, name = written.rpartition(":")
    if not colon or not place or not name:
        raise ValueError("write it as module.py:function or package.module:function")
    return f"{os.path.abspath(os.path.expanduser(place))}:{name}" if place.endswith(".py") else written


class FunctionReward(RewardSource):
    """What a Python function of yours says. It is called as `f(prompt, completions, row)`: the prompt is a string, or a
    list of `{"role": ..., "content": ...}`; completions are strings; row is a dict of the row's other columns.

    It returns a list with one number for each completion; None in it is a missing score. All arguments are copies;
    values that JSON does not know (a date) come as text.
    """

    name = "function"

    function: Annotated[str, AfterValidator(_target)]
    """`module.py:function`, or `package.module:function` of an installed package or the working directory."""
    per: Literal["group", "completion"] = "group"
    """What a call is for: all completions of a prompt, or one, as `f(prompt, completion, row)`, which returns one
    number; a call that fails then costs no other completion its score."""
    deadline: PositiveFloat = 30.0
    """Seconds for all completions of a step, or for those that `rollout.overlap` scores together. What has no score
    then has none."""
    load_deadline: PositiveFloat = 60.0
    """Seconds for importing the module when a run begins."""
    memory_mb: PositiveInt | None = 4096
    """The most address space of a process, in MB; a function that imports torch needs more. Null: no limit."""
    workers: PositiveInt = 1
    """Processes. With two or more, a completion that hangs does not keep the others waiting; a function that remembers
    things between calls then gives other numbers in each run."""
    environment: tuple[str, ...] = ()
    """Environment variables the function may see, beside PATH and the like."""

    @property
    def files(self) -> tuple[str, ...]:
        """The module, where it is written as a file. What that imports is not followed."""
        place = self.function.rpartition(":")[0]
        return (place,) if place.endswith(".py") and os.path.isfile(place) else ()

    def open(self, services: Services) -> Scorer:
        """Raises `ConfigError` when the function cannot be imported."""
        pool = Pool(self)
        try:
            with pool.process(time.monotonic() + self.load_deadline):
                return pool.score
        except Lost as error:
            raise ConfigError(
                f"the reward function cannot be loaded: {error}",
                where=f"function: {self.function}",
                fix="It is imported in a fresh process; import it in a fresh Python to see why.",
            ) from None


class Pool:
    """The processes of one reward function."""

    def __init__(self, source: FunctionReward) -> None:
        self.source = source
        self.label = f"function {os.path.basename(source.function)}"
        script = Path(__file__).with_name("worker.py")
        command = [sys.executable, "-P", str(script), source.function, str(source.memory_mb or 0)]
        seen = {name: os.environ[name] for name in (*PASSED, *source.environment) if name in os.environ}
        self._idle: SimpleQueue[Process] = SimpleQueue()
        for _ in range(source.workers):
            self._idle.put(Process(command, {"PYTHONHASHSEED": "0", **seen}))

    @contextmanager
    def process(self, until: float) -> Iterator[Process]:
        """A process that has loaded the function. Raises `Lost`."""
        process = self._idle.get()
        try:
            if not process.running:
                self._started(process, until)
            yield process
        finally:
            self._idle.put(process)

    def _started(self, process: Process, until: float) -> None:
        try:
            _told(process.start(until))
        except Lost:
            process.stop()
            raise

    def score(self, groups: List[Rollout]) -> list[list[Score]]:
        """The scores of a step."""
        until = time.monotonic() + self.source.deadline
        calls = [call for group in groups for call in self._calls(group)]
        with ThreadPoolExecutor(self.source.workers) as threads:
            answers = threads.map(lambda call: self._answer(call, until), calls)
            return [self._scores(group, answers) for group in groups]

    def _calls(self, group: Rollout) -> list[bytes]:
        """The arguments of the calls for a group, each a line of JSON."""
        texts = [completion.text for completion in group.completions]
        prompt, row = _plain(group.prompt), dict(group.extra)
        asked: List[Any] = [texts] if self.source.per == "group" else texts
        return [json.dumps([prompt, each, row], default=str).encode() + b"\n" for each in asked]

    def _answer(self, call: bytes, until: float) -> Any:
        """What the function returned, or an `Unscorable`."""
        if time.monotonic() >= until:
            return Unscorable(f"the deadline of {self.source.deadline:g} s had passed before its turn")
        try:
            with self.process(until) as process:
                return _told(process.ask(call, until))["answer"]
        except Lost as error:
            return Unscorable(str(error))

    def _scores(self, group: Rollout, answers: Iterator[Any]) -> list[Score]:
        whole = self.source.per == "group"
        return scores(self.label, group, next(answers) if whole else list(islice(answers, len(group.completions))))


def _plain(prompt: Text) -> Any:
    return prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]


def _told(line: bytes) -> dict[str, Any]:
    """The message of a process. Raises `Lost` for one that says what went wrong."""
    message: dict[str, Any] = json.loads(line)
    if "failed" in message:
        raise Lost(message["failed"])
    return message
