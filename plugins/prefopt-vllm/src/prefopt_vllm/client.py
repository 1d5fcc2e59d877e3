"""Requests to a server over HTTP. The server is not trusted: time and size of what it answers are limited, redirects
are not followed, the environment's proxies are not used. What a reply means is not known here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as List
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefopt.api import lazy_import, redact
from prefopt_vllm.wire import Broken

if TYPE_CHECKING:
    import asyncio

    import httpx2
else:
    asyncio = lazy_import("asyncio")
    httpx2 = lazy_import("httpx2")

LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which another try may succeed."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
SHOWN = 200


class Lost(Exception):
    """A server does not answer, or not in time, or not whole, however often it is asked."""


@dataclass(frozen=True)
class Client:
    """Asks one server."""

    url: str
    token: str
    timeout: float
    retries: int
    max_bytes: int
    parallel: int

    def get(self, path: str) -> Any:
        """Raises `Lost` or `Broken`."""
        return _raised(self._all("GET", path, [None])[0])

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Raises `Lost` or `Broken`."""
        return _raised(self._all("POST", path, [body or {}])[0])

    def many(self, path: str, bodies: List[Mapping[str, Any]]) -> list[Any]:
        """The reply to each request, or the `Lost` or `Broken` that came instead."""
        return self._all("POST", path, bodies)

    def answers(self) -> bool:
        """Whether the server is up, asked once."""
        try:
            options: dict[str, Any] = {"trust_env": False, "verify": self._encrypted}
            return httpx2.get(f"{self.url}/health", timeout=2.0, **options).status_code == 200
        except httpx2.TransportError:
            return False

    @property
    def _encrypted(self) -> bool:
        """Whether certificates are checked. Reading them takes a tenth of a second, and http has none."""
        return self.url.startswith("https:")

    def _all(self, method: str, path: str, bodies: List[Mapping[str, Any] | None]) -> list[Any]:
        """In a thread of its own: whoever calls may have an event loop running."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(self._gathered(method, path, bodies))).result()

    async def _gathered(self, method: str, path: str, bodies: List[Mapping[str, Any] | None]) -> list[Any]:
        gate = asyncio.Semaphore(self.parallel)
        options: dict[str, Any] = {"trust_env": False, "follow_redirects": False, "verify": self._encrypted}
        async with httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_connections=None), **options) as client:
            tasks = [asyncio.ensure_future(self._tried(client, gate, method, path, body)) for body in bodies]
            return await asyncio.gather(*tasks)

    async def _tried(
        self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, method: str, path: str, body: Any
    ) -> Any:
        async with gate:
            for attempt in range(self.retries + 1):
                if attempt:
                    await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)))
                try:
                    return await self._once(client, method, path, body)
                except Broken as error:
                    return error
                except (Lost, TimeoutError, httpx2.TransportError) as error:
                    why = str(error) or type(error).__name__
        return Lost(f"the server failed {self.retries + 1} times, at last with: {why}")

    async def _once(self, client: httpx2.AsyncClient, method: str, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        content = None if body is None else json.dumps(body).encode()
        found = bytearray()
        request = client.stream(method, self.url + path, content=content, headers=headers)
        async with asyncio.timeout(self.timeout), request as reply:
            async for chunk in reply.aiter_raw():
                found += chunk
                if len(found) > self.max_bytes:
                    raise Broken(f"a reply is longer than {self.max_bytes} bytes")
        return _read(reply.status_code, bytes(found), path, self.token)


def _read(status: int, found: bytes, path: str, token: str | None) -> Any:
    """A reply as data; what a server says of an error may hold the token it was sent."""
    if status != 200:
        said = str(redact(found.decode(errors="replace")))
        said = said.replace(token, "[redacted]") if token else said
        what = f"{path} answered HTTP {status}: {said[:SHOWN]}"
        raise Lost(what) if status in LATER else Broken(what)
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        raise Lost("a reply that is not JSON") from None


def _raised(found: Any) -> Any:
    if isinstance(found, Lost | Broken):
        raise found
    return found
