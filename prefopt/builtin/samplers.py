"""The plain sampler: the simplest correct one, for every causal model. It stays as the oracle of faster samplers.

Prompts of different lengths share a batch without padding, masks or shifted positions: every row grows by one token at
a time from the same position on, and a row whose prompt is not over yet is fed its prompt's next token.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat, PositiveInt

from prefopt.api import Completion, DataError, Draw, Drawer, LanguageModel, Request, Sampler, lazy_import

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    np = lazy_import("numpy")
    torch = lazy_import("torch")


def room(models: List[LanguageModel], request: Request, most: int) -> int:
    """How many tokens, at most `most`, all models can read behind the prompt. Raises `DataError` when it leaves no
    room."""
    limits = [model.positions for model in models if model.positions is not None]
    if not limits:
        return most
    left = min(limits) - len(request.prompt)
    if left < 1:
        what = f"a prompt has {len(request.prompt)} tokens, and the model can read {min(limits)}"
        raise DataError(what, fix="Shorten it: the reply needs room too.")
    return min(most, left)


def uniforms(request: Request, count: int) -> np.ndarray:
    """The uniform number for each token of a completion, in double precision. They depend on the request's key alone;
    asking for more of them changes none."""
    return np.random.Generator(np.random.Philox(key=request.key)).random(count)


class Plain(Sampler):
    """Ancestral sampling from the model's distribution, with a cache of keys and values.

    Each request has its own random numbers, from its key alone: one uniform number for each token, turned into a
    token by the inverse of the cumulative distribution. The text does not depend on what else is drawn beside it,
    up to rounding.
    """

    name = "plain"
    tells_own_logps = True

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

    def serves(self, draw: Draw) -> bool:
        return True

    def open(self, model: LanguageModel, other: LanguageModel | None = None, mix: float = 0.0) -> Drawer:
        models = [model] if other is None else [model, other]
        return lambda requests: self._draw(models, mix, requests)

    def _draw(
        self, models: List[LanguageModel], mix: float, requests: List[Request]
    ) -> Iterator[tuple[int, Completion]]:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        for first in range(0, len(order), self.batch):
            part = order[first : first + self.batch]
            rows = [_Row(requests[i], room(models, requests[i], self.max_new_tokens)) for i in part]
            self._decode(models, mix, rows)
            yield from zip(part, (row.completion(models[0]) for row in rows), strict=True)

    def _decode(self, models: List[LanguageModel], mix: float, rows: list[_Row]) -> None:
        """Fills the rows, all standing at the same position, until each has ended or is full."""
        position = min(len(row.request.prompt) for row in rows)
        states = [_State(model, [row.request.prompt[:position] for row in rows]) for model in models]
        while True:
            drawing = [i for i, row in enumerate(rows) if len(row.request.prompt) <= position]
            logps = self._mixed([state.logits[drawing] for state in states], mix)
            for i, token, logp in zip(drawing, *self._choose(logps, [rows[i] for i in drawing]), strict=True):
                rows[i].add(token, logp)
            going = [i for i, row in enumerate(rows) if not row.over(models[0])]
            if not going:
                return
            rows = [rows[i] for i in going]
            for state in states:
                state.advance(going, [row.token_at(position) for row in rows])
            position += 1

    def _mixed(self, logits: List[Tensor], mix: float) -> Tensor:
        """The log-probabilities that are drawn from, [n, V] in double precision."""
        scaled = [torch.log_softmax(x.double() / self.temperature, dim=-1) for x in logits]
        return scaled[0] if len(scaled) == 1 else torch.log_softmax((1 - mix) * scaled[0] + mix * scaled[1], dim=-1)

    def _choose(self, logps: Tensor, rows: List[_Row]) -> tuple[list[int], list[float]]:
        """A token for each row, by `logps` [n, V], and its log-probability under the distribution it was drawn from."""
        uniform = torch.tensor([row.uniforms[len(row.ids)] for row in rows], dtype=torch.double)
        total = logps.exp().cumsum(-1)
        threshold = uniform.to(total) * total[:, -1]
        drawn = torch.searchsorted(total, threshold[:, None], right=True).squeeze(1).clamp(max=logps.shape[-1] - 1)
        greedy = torch.tensor(
            [self.greedy or row.request.greedy for row in rows], dtype=torch.bool, device=drawn.device
        )
        chosen = torch.where(greedy, logps.argmax(-1), drawn)
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
        return uniforms(self.request, self.room)

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
