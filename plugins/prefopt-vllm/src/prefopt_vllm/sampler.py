"""The sampler `vllm`: its settings. What it does with them is the engine's business."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, PrivateAttr, model_validator

from prefopt.api import (
    DataError,
    Drawer,
    LanguageModel,
    PluginError,
    Request,
    Sampler,
    Services,
    ServiceURL,
    TokenName,
    secret,
    unencrypted,
)
from prefopt_vllm.engine import Engine
from prefopt_vllm.server import Serve

Share = Annotated[float, Field(gt=0, le=1)]


def _own_place() -> str:
    """The folder of this process beside those of others in the run: each has a server or weights of its own."""
    rank, world = (os.environ.get(name) or "0" for name in ("RANK", "WORLD_SIZE"))
    return f"rank-{rank}" if rank != "0" and world not in ("0", "1") else ""


class VLLM(Sampler):
    """Draws with vLLM over HTTP. Tokens go in; tokens and their log-probabilities come out, and nothing is tokenized
    again. After every change of the model its weights go to the server through files, and version, checksums and the
    log-probabilities of a probe are compared.

    Each request has a seed of its own, from its key alone. Log-probabilities are those of the distribution that was
    drawn from, after temperature and filters.
    """

    name = "vllm"

    url: ServiceURL | None = None
    """A server that runs already, as `http://127.0.0.1:8000`; it has to see the folder of the run."""
    serve: Serve | None = None
    """How to start a server for the time of the run: `{python: PATH}`, the interpreter of vLLM's own environment."""
    token: TokenName | None = None
    """The environment variable with the bearer token for `url`, as `env:NAME`."""
    temperature: PositiveFloat = 1.0
    """Divides the logits."""
    top_k: PositiveInt | None = None
    """Draw from that many most probable tokens alone."""
    top_p: Share | None = None
    """Draw from the fewest most probable tokens alone that hold this share of what the other filters leave."""
    min_p: Share | None = None
    """Draw from tokens alone that are at least this many times as probable as the most probable one. vLLM applies it
    before the other filters."""
    max_new_tokens: PositiveInt = 64
    """A completion that reaches it, or the most tokens the model can read, without an end-of-sequence token or a stop
    string is cut and marked unfinished."""
    min_new_tokens: NonNegativeInt = 0
    """No end-of-sequence token is drawn, and no stop string looked for, before so many tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A completion ends with the token that completes one of these strings. Its text ends before the string."""
    tolerance: PositiveFloat = 1e-3
    """The largest difference, in nats, of a probe's log-probabilities after weights were loaded. A server that does not
    compute in float32 needs more, such as 0.2."""
    parallel: PositiveInt = 256
    """Requests at a time."""
    timeout: PositiveFloat = 600.0
    """Seconds for one request, from connecting to the last byte."""
    retries: NonNegativeInt = 2
    """Further tries after a request that failed for a passing reason."""
    max_bytes: PositiveInt = 2**23
    """The longest reply to read."""
    allow_http: bool = False
    """Whether prompts and completions may go to another machine unencrypted."""
    _engine: Engine | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.url is None) == (self.serve is None):
            raise ValueError("say where the server is (`url`) or how to start one (`serve`)")
        if self.token is not None and self.url is None:
            raise ValueError("`token` is for `url`: a server that is started here gets one of its own")
        if self.url is not None and unencrypted(self.url) and not self.allow_http:
            raise ValueError("this sends prompts and completions unencrypted: write https, or `allow_http: true`")
        return self

    @property
    def density(self) -> float | None:
        filtered = self.top_k or self.top_p or self.min_p or self.min_new_tokens
        return None if filtered else self.temperature

    @property
    def distribution(self) -> dict[str, Any]:
        """What is drawn from, in vLLM's words."""
        filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p, "min_tokens": self.min_new_tokens}
        own = {name: x for name, x in filters.items() if x}
        return {"temperature": self.temperature, **own, **({"stop": list(self.stop)} if self.stop else {})}

    @property
    def limit(self) -> int | None:
        """The most tokens that a server started here is told to read."""
        return None if self.serve is None else self.serve.max_model_len

    @contextmanager
    def running(self, services: Services) -> Iterator[Sampler]:
        own = self.model_copy()
        token = "" if self.token is None else secret(self.token, "sampler: token")
        with TemporaryDirectory(prefix="prefopt-vllm-") as other:
            folder = (services.kept(self.name) or Path(other)) / _own_place()
            folder.mkdir(parents=True, exist_ok=True)
            own._engine = Engine(own, folder, token)
            try:
                yield own
            finally:
                own._engine.close()

    def open(self, model: LanguageModel, other: LanguageModel | None = None, mix: float = 0.0) -> Drawer:
        if other is not None:
            raise PluginError("sampler `vllm` draws from one model, not from a mixture")
        if self._engine is None:
            raise PluginError("sampler `vllm` draws within `running` alone, which starts and stops its server")
        return partial(self._engine.draw, model)

    def room(self, model: LanguageModel, request: Request) -> int:
        """How many tokens may stand behind a prompt. Raises `DataError` when there is no room, `PluginError` for a
        request that asks for what this does not do."""
        if request.greedy:
            raise PluginError("sampler `vllm` draws at random alone")
        limits = [model.positions, self.limit]
        most = min((limit for limit in limits if limit is not None), default=None)
        left = self.max_new_tokens if most is None else min(self.max_new_tokens, most - len(request.prompt))
        if left < 1:
            what = f"a prompt has {len(request.prompt)} tokens, and the model can read {most}"
            raise DataError(what, fix="Shorten it: the reply needs room too.")
        return left
