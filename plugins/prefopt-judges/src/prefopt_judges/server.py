"""Questions to a server over HTTP, and what became of them. The server is not trusted: time, size and shape of what it
answers are checked, redirects are not followed, the environment's proxies are not used, and of a reply only what is
needed is kept, without secrets."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Sequence as List
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prefopt.api import ServiceError, lazy_import, redact
from prefopt_judges.asking import Answer
from prefopt_judges.kept import Replies, request_hash
from prefopt_judges.questions import VERSION, Question
from prefopt_judges.texts import without
from prefopt_judges.wire import Form, NoAnswer, NoProbabilities, body, chances, choice, tokens, written

if TYPE_CHECKING:
    import asyncio

    import httpx2

    from prefopt_judges.openai import OpenAI
else:
    asyncio = lazy_import("asyncio")
    httpx2 = lazy_import("httpx2")

LATER = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""Answers after which another try may succeed."""
NEVER = {401: "does not accept the token", 403: "does not let us in", 404: "knows no such address or model"}
"""Answers that every other question would get too."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
BYTES_IN_A_TOKEN = 3
"""What a token is taken for where a server does not count them."""


class Later(Exception):
    """A request failed for a reason that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass
class Budget:
    """What may be spent. Requests that are under way when it is used up are still paid for."""

    tokens: int | None
    money: float | None
    prices: tuple[float, float]
    spent_tokens: int = 0
    spent_money: float = 0.0

    def check(self) -> None:
        """Raises `NoAnswer` when it is used up."""
        if self.tokens is not None and self.spent_tokens >= self.tokens:
            raise NoAnswer(f"the budget of {self.tokens:,} tokens is used up")
        if self.money is not None and self.spent_money >= self.money:
            raise NoAnswer(f"the budget of {self.money:g} is used up")

    def take(self, read: int, wrote: int) -> dict[str, float]:
        """Counts what a reply took."""
        cost = (read * self.prices[0] + wrote * self.prices[1]) / 1e6
        self.spent_tokens += read + wrote
        self.spent_money += cost
        return {"tokens_in": float(read), "tokens_out": float(wrote), **({"cost": cost} if any(self.prices) else {})}


@dataclass
class Server:
    """Asks a server. `jitter` gives random numbers from 0 to 1; `pause` waits."""

    judge: OpenAI
    token: str
    replies: Replies
    jitter: Callable[[], float]
    pause: Callable[[float], Awaitable[None]] | None = None
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    transport: httpx2.AsyncBaseTransport | None = None
    budget: Budget = field(init=False)
    form: Form = field(init=False)

    def __post_init__(self) -> None:
        prices = (self.judge.price_in, self.judge.price_out)
        self.budget = Budget(self.judge.max_tokens, self.judge.max_cost, prices)
        self.form = "json" if self.judge.answer == "json" else "label"

    def __call__(self, questions: List[Question]) -> list[Answer]:
        """In a thread of its own: whoever calls may have an event loop running. Raises `ServiceError` when the server
        would refuse every question."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(self._all(questions))).result()

    async def _all(self, questions: List[Question]) -> list[Answer]:
        gate = asyncio.Semaphore(self.judge.parallel)
        client = httpx2.AsyncClient(timeout=None, trust_env=False, transport=self.transport, follow_redirects=False)
        async with client:
            return await asyncio.gather(*(self._answer(client, gate, question) for question in questions))

    async def _answer(self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, question: Question) -> Answer:
        taken: dict[str, float] = {}
        try:
            async with gate, asyncio.timeout(self.judge.deadline):
                return Answer(await self._asked(client, question, taken), usage=taken)
        except TimeoutError:
            return Answer(None, f"there was no answer within {self.judge.deadline:g} s", taken)
        except NoAnswer as error:
            return Answer(None, self._clean(str(error)), taken)

    async def _asked(self, client: httpx2.AsyncClient, question: Question, taken: dict[str, float]) -> dict[str, float]:
        """By the probabilities of a label; else, as the judge is set, by the label itself or once more as JSON."""
        form = self.form
        found = await self._choice(client, question, form, taken)
        try:
            return chances(found, question.labels, form)
        except NoProbabilities:
            if self.judge.answer == "label" or self.judge.api == "completions":
                return written(found, question.labels)
        self.form = "json"
        return chances(await self._choice(client, question, "json", taken), question.labels, "json")

    async def _choice(
        self, client: httpx2.AsyncClient, question: Question, form: Form, taken: dict[str, float]
    ) -> dict[str, Any]:
        """The reply to a question: the one that is kept, or a new one, which is then kept."""
        judge = self.judge
        asked = {**body(question, judge.model, judge.temperature, form, judge.api == "completions"), **judge.options}
        name = request_hash(url=judge.url, words=VERSION, body=asked)
        kept = self.replies.get(name)
        if kept is not None:
            _count(taken, {"cached": 1.0})
            return choice(kept[0])
        if judge.offline:
            raise NoAnswer("nobody has asked this before, and the judge is offline")
        reply = await self._tried(client, json.dumps(asked).encode(), taken)
        found = {"choices": [self._scrubbed(choice(reply))]}
        read, wrote = tokens(reply) or (len(json.dumps(asked)) // BYTES_IN_A_TOKEN, 1)
        usage = self.budget.take(read, wrote)
        _count(taken, usage)
        self.replies.add(name, f"{urlsplit(judge.url).hostname}/{judge.model}", VERSION, found, usage)
        return choice(found)

    async def _tried(self, client: httpx2.AsyncClient, question: bytes, taken: dict[str, float]) -> Any:
        for attempt in range(self.judge.retries + 1):
            self.budget.check()
            _count(taken, {"calls": 1.0})
            wait = 0.0
            try:
                return _read(await self._once(client, question))
            except (Later, TimeoutError, httpx2.TransportError) as error:
                last, wait = error, getattr(error, "wait", 0.0)
            if wait > self.judge.longest_wait:
                raise NoAnswer(f"the server wants {wait:.0f} s of rest, more than {self.judge.longest_wait:g}")
            if attempt < self.judge.retries:
                longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
                await (self.pause or asyncio.sleep)(wait + longest * self.jitter())
        raise self._gave_up(last)

    def _gave_up(self, last: Exception) -> Exception:
        tries = f"{self.judge.retries + 1} times, at last with: {str(last) or type(last).__name__}"
        if isinstance(last, httpx2.ConnectError):
            fix = "Start it, or check `url`. What was answered until now is kept."
            return ServiceError(f"the server was not to be reached {tries}", where=self.judge.url, fix=fix)
        return NoAnswer(f"the server failed {tries}")

    async def _once(self, client: httpx2.AsyncClient, question: bytes) -> bytes:
        found = bytearray()
        path = "/completions" if self.judge.api == "completions" else "/chat/completions"
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        request = client.stream("POST", self.judge.url.rstrip("/") + path, content=question, headers=headers)
        async with asyncio.timeout(self.judge.timeout), request as reply:
            self._refuse(reply)
            async for chunk in reply.aiter_raw():
                found += chunk
                if len(found) > self.judge.max_bytes:
                    raise NoAnswer(f"the reply is longer than {self.judge.max_bytes} bytes")
        return bytes(found)

    def _refuse(self, reply: httpx2.Response) -> None:
        """Raises for a reply that is no answer."""
        if reply.status_code in LATER:
            raise Later(f"HTTP {reply.status_code}", _rest(reply.headers.get("Retry-After", ""), self.now()))
        if reply.status_code in NEVER:
            what = f"the server {NEVER[reply.status_code]} (HTTP {reply.status_code})"
            fix = "Check `url`, `model` and `token`. What was answered until now is kept."
            raise ServiceError(what, where=self.judge.url, fix=fix)
        if reply.is_redirect:
            raise NoAnswer("the server redirects to another address, which is not followed")
        if reply.status_code != 200:
            raise NoAnswer(f"the server answered HTTP {reply.status_code}")
        if reply.headers.get("Content-Encoding", "identity") != "identity":
            raise NoAnswer("the server compressed its reply, though it was asked not to")

    def _clean(self, text: str) -> str:
        return without(str(redact(text)), [self.token])

    def _scrubbed(self, value: Any) -> Any:
        """What is kept of a reply: every text without secrets."""
        if isinstance(value, str):
            return self._clean(value)
        if isinstance(value, dict):
            return {self._clean(str(k)): self._scrubbed(v) for k, v in value.items()}
        return [self._scrubbed(item) for item in value] if isinstance(value, list) else value


def _count(taken: dict[str, float], more: Mapping[str, float]) -> None:
    for name, x in more.items():
        taken[name] = taken.get(name, 0.0) + x


def _read(found: bytes) -> Any:
    """A reply as data. Raises `Later` for what is no JSON: it was cut, or something on the way wrote it."""
    try:
        return json.loads(found, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Later("a reply that is not JSON") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _rest(header: str, now: datetime) -> float:
    """The seconds that a `Retry-After` asks for, as a number or as a date; 0 when it cannot be read.

    >>> _rest("7", datetime.now(UTC)), _rest("soon", datetime.now(UTC))
    (7.0, 0.0)
    """
    if header.strip().isascii() and header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - now).total_seconds())
    except (ValueError, TypeError):
        return 0.0
