"""A server that speaks the OpenAI protocol, as a judge: its settings."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from prefopt.api import Services, ServiceURL, TokenName, secret, unencrypted
from prefopt_judges.asking import Ask, LanguageJudge
from prefopt_judges.kept import Replies
from prefopt_judges.server import Server


class OpenAI(LanguageJudge):
    """Any OpenAI-compatible server. The verdict is the probability of its answer where the server gives it, else what
    it answers as JSON, read strictly."""

    name = "openai"

    url: ServiceURL
    """Where the server is, as `https://host/v1`, or http on this machine."""
    model: str
    """The model's name there."""
    token: TokenName | None = None
    """The environment variable with a bearer token, as `env:NAME`."""
    api: Literal["chat", "completions"] = "chat"
    """Which interface: `completions` is for base models."""
    answer: Literal["auto", "label", "json"] = "auto"
    """How it answers: with one word, by its probabilities or, without them, by what it wrote (`label`); as JSON under
    a schema (`json`); or by probabilities, and as JSON where a server gives none (`auto`)."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of answers without probabilities."""
    options: dict[str, Any] = Field({})
    """Further fields of the request, such as `{reasoning_effort: low}`; they replace ours."""
    parallel: PositiveInt = 8
    """Requests at a time."""
    timeout: PositiveFloat = 60.0
    """Seconds for one request, from connecting to the last byte."""
    deadline: PositiveFloat = 300.0
    """Seconds for one question with all its tries and pauses."""
    retries: NonNegativeInt = 4
    """Further tries after a request that failed for a passing reason, each after a longer random pause, and after what
    the server asks for."""
    longest_wait: NonNegativeFloat = 120.0
    """The longest rest a server may ask for, in seconds; a question that would have to wait longer has no answer."""
    max_bytes: PositiveInt = 2**20
    """The longest reply to read."""
    max_tokens: PositiveInt | None = None
    """Tokens, read and written, after which nothing more is asked. Default: no limit."""
    max_cost: PositiveFloat | None = None
    """Money after which nothing more is asked, in the unit of the prices. Default: no limit."""
    price_in: NonNegativeFloat = 0.0
    """The price of a million tokens read."""
    price_out: NonNegativeFloat = 0.0
    """The price of a million tokens written."""
    offline: bool = False
    """Whether only replies that are kept count: what is not among them has no verdict."""
    allow_http: bool = False
    """Whether prompts and replies may go to another machine unencrypted."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if unencrypted(self.url) and not self.allow_http:
            raise ValueError("this sends prompts and replies unencrypted: write https, or `allow_http: true`")
        if self.max_cost is not None and not (self.price_in or self.price_out):
            raise ValueError("`max_cost` needs `price_in` and `price_out`")
        if self.api == "completions" and self.answer == "json":
            raise ValueError("`completions` has no JSON schema: write answer: label")
        return self

    def asker(self, services: Services, replies: Replies) -> Ask:
        """Raises `ConfigError` when the environment has no token."""
        token = "" if self.token is None or self.offline else secret(self.token, "openai: token")
        return Server(self, token, replies, services.rng("judge", self.name).random)
