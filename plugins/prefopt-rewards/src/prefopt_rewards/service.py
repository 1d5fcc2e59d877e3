"""A scoring service as a reward, over HTTP. The service is not trusted: time, size and shape of what it answers are
checked, and it is told no more than the prompt, the completions and the columns it was promised."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Sequence as List
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from prefopt.api import (
    RewardSource,
    Rollout,
    Score,
    Scorer,
    Services,
    ServiceURL,
    TokenName,
    lazy_import,
    secret,
    unencrypted,
)
from prefopt_rewards.scores import Unscorable, scores

if TYPE_CHECKING:
    import asyncio

    import httpx2
else:
    asyncio = lazy_import("asyncio")
    httpx2 = lazy_import("httpx2")

LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which another try may succeed."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0


class HTTPReward(RewardSource):
    """What a scoring service says. For each prompt it gets a POST of
    `{"prompt": ..., "completions": [...], "row": {...}}` and answers `{"scores": [...]}`, one number for each
    completion; null is a missing score.

    Redirects are not followed and the environment's proxies are not used.
    """

    name = "http"

    url: ServiceURL
    """Where the service is: https, or http on this machine."""
    columns: tuple[str, ...] = ()
    """The columns of a row that are sent; a row without one of them has no score."""
    token: TokenName | None = None
    """The environment variable with a bearer token, as `env:NAME`."""
    deadline: PositiveFloat = 60.0
    """Seconds for all completions of a step, or for those that `rollout.overlap` scores together. What has no score
    then has none."""
    timeout: PositiveFloat = 20.0
    """Seconds for one request, from connecting to the last byte."""
    retries: NonNegativeInt = 3
    """Further tries after a request that failed for a passing reason, each after a longer random pause."""
    parallel: PositiveInt = 4
    """Requests at a time."""
    max_bytes: PositiveInt = 2**20
    """The longest answer to read."""
    allow_http: bool = False
    """Whether prompts and replies may go to another machine unencrypted."""

    @model_validator(mode="after")
    def _encrypted(self) -> Self:
        if unencrypted(self.url) and not self.allow_http:
            raise ValueError("this sends prompts and replies unencrypted: write https, or `allow_http: true`")
        return self

    def open(self, services: Services) -> Scorer:
        """Raises `ConfigError` when the environment has no token."""
        return Service(self, self._headers(), services.rng("reward", self.name).random)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token is None:
            return headers
        return {**headers, "Authorization": f"Bearer {secret(self.token, 'http: token')}"}


class Later(Exception):
    """A request failed for a reason that may pass."""


@dataclass
class Service:
    """Scores with the service. `jitter` gives random numbers from 0 to 1; `pause` waits."""

    source: HTTPReward
    headers: Mapping[str, str]
    jitter: Callable[[], float]
    pause: Callable[[float], Awaitable[None]] | None = None
    transport: httpx2.AsyncBaseTransport | None = None

    def __call__(self, groups: List[Rollout]) -> list[list[Score]]:
        """In a thread of its own: whoever calls may have an event loop running."""
        with ThreadPoolExecutor(1) as thread:
            answers = thread.submit(lambda: asyncio.run(self._all(groups))).result()
        label = f"http {urlsplit(self.source.url).hostname}"
        return [scores(label, group, answer) for group, answer in zip(groups, answers, strict=True)]

    async def _all(self, groups: List[Rollout]) -> list[Any]:
        until = asyncio.get_running_loop().time() + self.source.deadline
        gate = asyncio.Semaphore(self.source.parallel)
        client = httpx2.AsyncClient(timeout=None, trust_env=False, transport=self.transport)
        async with client:
            return await asyncio.gather(*(self._answer(client, gate, until, group) for group in groups))

    async def _answer(self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, until: float, group: Rollout) -> Any:
        """What the service says to a group, or an `Unscorable`."""
        try:
            async with asyncio.timeout_at(until), gate:
                return await self._tried(client, self._question(group))
        except TimeoutError:
            return Unscorable(f"there was no answer within {self.source.deadline:g} s")
        except Unscorable as error:
            return error

    def _question(self, group: Rollout) -> bytes:
        prompt: Any = group.prompt
        if not isinstance(prompt, str):
            prompt = [{"role": m.role, "content": m.content} for m in prompt]
        absent = [name for name in self.source.columns if name not in group.extra]
        if absent:
            raise Unscorable(f"the row has no column `{absent[0]}`; it has {', '.join(group.extra) or 'no columns'}")
        row = {name: group.extra[name] for name in self.source.columns}
        texts = [completion.text for completion in group.completions]
        try:
            return json.dumps({"prompt": prompt, "completions": texts, "row": row}, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise Unscorable(f"the row cannot be sent: {error}") from None

    async def _tried(self, client: httpx2.AsyncClient, question: bytes) -> Any:
        for attempt in range(self.source.retries + 1):
            try:
                return _read(await self._once(client, question))
            except (Later, TimeoutError, httpx2.TransportError) as error:
                last = str(error) or type(error).__name__
            if attempt < self.source.retries:
                longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
                await (self.pause or asyncio.sleep)(longest * self.jitter())
        raise Unscorable(f"the service failed {self.source.retries + 1} times, at last with: {last}")

    async def _once(self, client: httpx2.AsyncClient, question: bytes) -> bytes:
        body = bytearray()
        request = client.stream("POST", self.source.url, content=question, headers=dict(self.headers))
        async with asyncio.timeout(self.source.timeout), request as reply:
            _refuse(reply)
            async for chunk in reply.aiter_raw():
                body += chunk
                if len(body) > self.source.max_bytes:
                    raise Unscorable(f"the answer is longer than {self.source.max_bytes} bytes")
        return bytes(body)


def _refuse(reply: httpx2.Response) -> None:
    """Raises `Later` or `Unscorable` for a reply that is no answer."""
    if reply.status_code in LATER:
        raise Later(f"HTTP {reply.status_code}")
    if reply.is_redirect:
        raise Unscorable("the service redirects to another address, which is not followed")
    if reply.status_code != 200:
        raise Unscorable(f"the service answered HTTP {reply.status_code}")
    if reply.headers.get("Content-Encoding", "identity") != "identity":
        raise Unscorable("the service compressed its answer, though it was asked not to")


def _read(body: bytes) -> Any:
    try:
        return json.loads(body)["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Unscorable('the answer is not {"scores": [...]}') from None
