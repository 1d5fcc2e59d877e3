"""One vLLM server for the time of a run: weights go to it, completions come from it. It knows the order of things:
start, write, pause, reload, resume, check, draw, and what to do when something of that fails.

Nothing that was drawn with other weights than the model's is ever handed on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from collections.abc import Sequence as List
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.api import Completion, LanguageModel, Request, ServiceError
from prefopt_vllm import wire
from prefopt_vllm.client import Client, Lost
from prefopt_vllm.server import Server
from prefopt_vllm.weights import Weights, compared
from prefopt_vllm.wire import Asked, Broken, Drawn, Stale

if TYPE_CHECKING:
    from prefopt_vllm.sampler import VLLM

GENERATE = "/inference/v1/generate"
PROCESSED = "processed_logprobs"
FAILURES = 3
"""Times in a row that the same draw may be begun again."""
RESUMABLE = "What was drawn before is kept; `prefopt resume` continues."


@dataclass
class Engine:
    """Draws for one sampler. `folder` holds the weights on their way, the log of a server that was started here, and
    `events.jsonl`: every start, every change of weights with what was checked, every failure."""

    sampler: VLLM
    folder: Path
    token: str = ""
    client: Client = field(init=False)
    server: Server | None = None
    name: str = ""
    holds: str = ""
    """The version of the weights that the server was seen to have, after all checks."""

    def __post_init__(self) -> None:
        if self.sampler.url is not None:
            self.client = self._client(self.sampler.url.rstrip("/"), self.token)

    def _client(self, url: str, token: str) -> Client:
        sampler = self.sampler
        return Client(url, token, sampler.timeout, sampler.retries, sampler.max_bytes, sampler.parallel)

    def close(self) -> None:
        """Stops what was started and removes the weights."""
        self._stop()
        for left in self.folder.glob("*prefopt-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _stop(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.server, self.holds = None, ""

    # --- drawing ----------------------------------------------------------------------------------------------------

    def draw(self, model: LanguageModel, requests: List[Request]) -> Iterator[tuple[int, Completion]]:
        """A completion for each request, in their order. Raises `ServiceError` when the server cannot be made to give
        them."""
        drawn: dict[int, Drawn] = {}
        wanted = [(request, self.sampler.room(model, request)) for request in requests]
        weights, left, failures = Weights(model, self.sampler.limit), list(range(len(requests))), 0
        while left:
            found, why = self._some(weights, [wanted[i] for i in left])
            drawn |= {left[k]: one for k, one in found.items()}
            left = [i for k, i in enumerate(left) if k not in found]
            if why is not None:
                failures = 1 if found else failures + 1
                self._recover(why, failures)
        yield from ((i, self._completion(model, drawn[i])) for i in range(len(requests)))

    def _some(
        self, weights: Weights, wanted: List[tuple[Request, int]]
    ) -> tuple[dict[int, Drawn], Lost | Stale | None]:
        """What could be drawn for requests and their room, by place, and why not all of it."""
        try:
            self._ready(weights)
            ends = weights.model.end_ids
            asked = [Asked(request, room, ends, self.name, weights.version) for request, room in wanted]
            bodies = [one.body(self.sampler.distribution) for one in asked]
            replies = self.client.many(GENERATE, bodies)
            return _sorted(replies, asked)
        except (Lost, Stale) as error:
            return {}, error
        except Broken as error:
            raise self._error(error) from None

    def _recover(self, why: Lost | Stale, failures: int) -> None:
        """Makes ready for another try, or raises `ServiceError`."""
        self._record("failed", why=str(why), failures=failures)
        if failures >= FAILURES or (isinstance(why, Lost) and self.sampler.serve is None):
            raise self._error(why)
        self.holds = ""
        if isinstance(why, Lost):
            self._stop()

    def _error(self, why: Exception) -> ServiceError:
        where = str(self.folder / "server.log") if self.sampler.url is None else self.sampler.url
        return ServiceError(f"vLLM: {why}", where=where, fix=RESUMABLE)

    def _completion(self, model: LanguageModel, one: Drawn) -> Completion:
        ended = one.ids[-1] in model.end_ids
        text = model.decode(one.ids[:-1] if ended else one.ids)
        if one.finished and not ended:
            places = [place for stop in self.sampler.stop if (place := text.find(stop)) >= 0]
            if not places:
                raise self._error(Broken("the server ended a completion at a stop string that is not in it"))
            text = text[: min(places)]
        return Completion(text, one.ids, one.logps, one.finished, source=self.sampler.name)

    # --- weights ----------------------------------------------------------------------------------------------------

    def _ready(self, weights: Weights) -> None:
        """Sees to it that a server runs and holds these weights."""
        if self.sampler.serve is not None and (self.server is None or not self.server.alive):
            self._start(weights)
        if self.holds != weights.version or wire.version(self.client.get("/weight_info")) != weights.version:
            self._load(weights)

    def _start(self, weights: Weights) -> None:
        assert self.sampler.serve is not None, "only a server that is to be served is started"
        self._stop()
        self.server = Server(self.sampler.serve, weights.written(self.folder), self.folder / "server.log")
        self.client = self._client(self.server.url, self.server.token)
        self.server.wait(self.client.answers)
        self._record("started", pid=self.server.process.pid)

    def _load(self, weights: Weights) -> None:
        """Puts the weights into the server and checks that they are there."""
        self.holds = ""
        folder = weights.written(self.folder)
        mode, dtype = wire.setup(self.client.get("/server_info?config_format=json"))
        if mode != PROCESSED:
            raise Broken(f"its log-probabilities are {mode}: start it with --logprobs-mode {PROCESSED}")
        self.name = wire.served(self.client.get("/v1/models"))
        self._reload(folder, weights.version)
        self._check(weights, folder, dtype)
        self.holds = weights.version
        for old in self.folder.glob("prefopt-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def _reload(self, folder: Path, version: str) -> None:
        self.client.post("/pause?mode=wait")
        try:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
            self.client.post("/collective_rpc", reload)
            self.client.post("/update_weight_version", {"new_version": version})
        except Exception:
            with suppress(Lost, Broken):
                self.client.post("/resume")
            raise
        self.client.post("/resume")

    def _check(self, weights: Weights, folder: Path, dtype: str) -> None:
        """Raises `Stale` when the server does not hold these weights: by their version, by the checksums of those that
        it keeps as they were, and by what it says of a probe."""
        held = wire.version(self.client.get("/weight_info"))
        if held != weights.version:
            raise Stale(f"the server holds the weights {held}, not {weights.version}")
        found = wire.digests(self.client.post("/weight_checker", {"action": "checksum"}))
        equal, wrong = compared(folder, found, dtype)
        if wrong or not equal:
            named = ", ".join(wrong[:3]) or "all"
            raise Stale(f"the server's weights have other checksums than the model's: {named}")
        gap = self._gap(weights)
        if not gap <= self.sampler.tolerance:
            what = f"the server's log-probabilities of a probe are {gap:.2g} from the model's"
            raise Stale(f"{what}, more than `tolerance` {self.sampler.tolerance:g}")
        self._record("loaded", version=held, checksums=equal, of=len(found), probe_gap=gap)

    def _gap(self, weights: Weights) -> float:
        """The largest difference of log-probabilities in the probe, in nats."""
        ids, own = weights.probe
        asked = Asked(Request(ids, 0), 1, (), self.name, weights.version)
        told = wire.prompt_logps(self.client.post(GENERATE, asked.body({"prompt_logprobs": 0})), ids)
        return max(abs(a - b) for a, b in zip(own, told, strict=True))

    def _record(self, event: str, **facts: Any) -> None:
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")


def _sorted(replies: List[Any], asked: List[Asked]) -> tuple[dict[int, Drawn], Lost | Stale | None]:
    """What was drawn, and a reason where something was not. Raises `Broken`."""
    found: dict[int, Drawn] = {}
    why: Lost | Stale | None = None
    for k, (reply, one) in enumerate(zip(replies, asked, strict=True)):
        try:
            if isinstance(reply, Lost | Broken):
                raise reply
            found[k] = wire.drawn(reply, one)
        except (Lost, Stale) as error:
            why = error
    return found, why
