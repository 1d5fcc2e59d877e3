"""The plain sampler: the simplest correct one, for every causal model. It stays as the oracle of faster samplers.

Prompts of different lengths share a batch without padding, masks or shifted positions: every row grows by one token at
a time from the same position on, and a row whose prompt is not over yet is fed its prompt's next token.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat, PositiveInt

from prefopt.api import Completion, DataError, Drawer, LanguageModel, Request, Sampler, lazy_import

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    np = lazy_import("numpy")
    torch = lazy_import("torch")


class Plain(Sampler):
    """Ancestral sampling from the model's distribution, with a cache of keys and values.

    Each request has its own random numbers, from its key alone: one uniform number for each token, turned into a
    token by the inverse of the cumulative distribution. The text does not depend on what else is drawn beside it,
    up to rounding.
    """

    name = "plain"

    temperature: PositiveFloat = 1.0
    """Divides the logits."""
    max_new_tokens: PositiveInt = 64
    """A completion that reaches it, or the most tokens the model can read, without an end-of-sequence token is cut and
    marked unfinished."""
    batch: PositiveInt = 512
    """Requests in one forward pass."""
    greedy: bool = False
    """Take the most probable token instead of drawing one."""

    @property
    def density(self) -> float | None:
        return None if self.greedy else self.temperature

    def open(self, model: LanguageModel) -> Drawer:
        def drawer(requests: List[Request]) -> list[Completion]:
            return self._draw(model, requests)

        return drawer

    def _draw(self, model: LanguageModel, requests: List[Request]) -> list[Completion]:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        found: dict[int, Completion] = {}
        for first in range(0, len(order), self.batch):
            part = order[first : first + self.batch]
            rows = [_Row(requests[i], self._room(model, requests[i])) for i in part]
            self._decode(model, rows)
            found.update(zip(part, (row.completion(model) for row in rows), strict=True))
        return [found[i] for i in range(len(requests))]

    def _room(self, model: LanguageModel, request: Request) -> int:
        """The most tokens to draw. Raises `DataError` for a prompt that leaves no room."""
        if model.positions is None:
            return self.max_new_tokens
        room = model.positions - len(request.prompt)
        if room < 1:
            what = f"a prompt has {len(request.prompt)} tokens, and the model can read {model.positions}"
            raise DataError(what, fix="Shorten it: the reply needs room too.")
        return min(self.max_new_tokens, room)

    def _decode(self, model: LanguageModel, rows: list[_Row]) -> None:
        """Fills the rows, all standing at the same position, until each has ended or is full."""
        position = min(len(row.request.prompt) for row in rows)
        state = _State(model, [row.request.prompt[:position] for row in rows])
        while True:
            drawing = [i for i, row in enumerate(rows) if len(row.request.prompt) <= position]
            uniform = [rows[i].uniforms[len(rows[i].ids)] for i in drawing]
            drawn = self._choose(state.logits[drawing], torch.tensor(uniform, dtype=torch.double))
            for i, token, logp in zip(drawing, *drawn, strict=True):
                rows[i].add(token, logp)
            going = [i for i, row in enumerate(rows) if not row.over(model)]
            if not going:
                return
            rows = [rows[i] for i in going]
            state.advance(going, [row.token_at(position) for row in rows])
            position += 1

    def _choose(self, logits: Tensor, uniform: Tensor) -> tuple[list[int], list[float]]:
        """A token for each row of `logits` [n, V], and its log-probability under the distribution it was drawn from."""
        logps = torch.log_softmax(logits.double() / self.temperature, dim=-1)
        if self.greedy:
            chosen = logps.argmax(-1)
        else:
            total = logps.exp().cumsum(-1)
            threshold = uniform.to(total) * total[:, -1]
            chosen = torch.searchsorted(total, threshold[:, None], right=True).squeeze(1)
            chosen = chosen.clamp(max=logits.shape[-1] - 1)
        return chosen.tolist(), logps.gather(1, chosen[:, None]).squeeze(1).tolist()


@dataclass
class _Row:
    """One request on its way, with its own uniform numbers."""

    request: Request
    room: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    @cached_property
    def uniforms(self) -> Any:
        return np.random.Generator(np.random.Philox(key=self.request.key)).random(self.room)

    def add(self, token: int, logp: float) -> None:
        self.ids.append(token)
        self.logps.append(logp)

    def token_at(self, position: int) -> int:
        """The token at a position of prompt and completion together."""
        prompt = self.request.prompt
        return prompt[position] if position < len(prompt) else self.ids[position - len(prompt)]

    def over(self, model: LanguageModel) -> bool:
        return len(self.ids) == self.room or self.ended(model)

    def ended(self, model: LanguageModel) -> bool:
        return bool(self.ids) and self.ids[-1] in model.end_ids

    def completion(self, model: LanguageModel) -> Completion:
        text = model.decode(self.ids[:-1] if self.ended(model) else self.ids)
        return Completion(text, tuple(self.ids), tuple(self.logps), self.ended(model), source=Plain.name)


class _State:
    """The model's cache of keys and values, and the logits after the last token of every row."""

    def __init__(self, model: LanguageModel, prompts: List[tuple[int, ...]]) -> None:
        self.model = model
        self.size = len(prompts)
        self._read(prompts, None)

    def advance(self, going: list[int], tokens: List[int]) -> None:
        """Drops the rows that are not in `going` and appends one token to each of the others."""
        if len(going) < self.size:
            self.size = len(going)
            self.cache.batch_select_indices(torch.tensor(going, device=self.model.device))
        self._read([(token,) for token in tokens], self.cache)

    def _read(self, tokens: List[tuple[int, ...]], cache: Any) -> None:
        ids = torch.tensor(tokens, device=self.model.device)
        with torch.no_grad():
            out: Any = self.model.network(input_ids=ids, past_key_values=cache, use_cache=True)
        self.logits, self.cache = out.logits[:, -1], out.past_key_values
