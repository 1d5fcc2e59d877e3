"""The plain sampler: the simplest correct one, for every causal model. Requests of equal length share a forward
pass, so there is no padding, no mask and no position to get wrong. It stays as the oracle of faster samplers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as List
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from prefopt.api import Completion, Drawer, LanguageModel, Request, Sampler, lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
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
    """A completion that reaches it without an end-of-sequence token is cut and marked unfinished."""
    batch: PositiveInt = 512
    """Requests in one forward pass."""
    greedy: bool = False
    """Take the most probable token instead of drawing one."""

    def open(self, model: LanguageModel) -> Drawer:
        def drawer(requests: List[Request]) -> list[Completion]:
            return self._draw(model, requests)

        return drawer

    def _draw(self, model: LanguageModel, requests: List[Request]) -> list[Completion]:
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_length[len(request.prompt)].append(i)
        found: dict[int, Completion] = {}
        for index in by_length.values():
            for first in range(0, len(index), self.batch):
                part = index[first : first + self.batch]
                found.update(zip(part, self._decode(model, [requests[i] for i in part]), strict=True))
        return [found[i] for i in range(len(requests))]

    def _decode(self, model: LanguageModel, requests: List[Request]) -> list[Completion]:
        uniforms = torch.from_numpy(np.stack([_uniforms(r.key, self.max_new_tokens) for r in requests]))
        ids: list[list[int]] = [[] for _ in requests]
        logps: list[list[float]] = [[] for _ in requests]
        alive = list(range(len(requests)))
        steps = _Steps(model, [r.prompt for r in requests])
        for step in range(self.max_new_tokens):
            drawn, logp = self._choose(steps.logits, uniforms[alive, step].to(steps.logits.device))
            tokens = drawn.tolist()
            for i, token, value in zip(alive, tokens, logp.tolist(), strict=True):
                ids[i].append(token)
                logps[i].append(value)
            going = [k for k, token in enumerate(tokens) if token not in model.end_ids]
            alive = [alive[k] for k in going]
            if not alive or step + 1 == self.max_new_tokens:
                break
            steps.advance(drawn, going)
        return [_completion(model, i, p) for i, p in zip(ids, logps, strict=True)]

    def _choose(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n] and their log-probabilities [n] under the distribution they were drawn from."""
        logps = torch.log_softmax(logits.double() / self.temperature, dim=-1)
        if self.greedy:
            chosen = logps.argmax(-1)
        else:
            total = logps.exp().cumsum(-1)
            chosen = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True).squeeze(1)
            chosen = chosen.clamp(max=logits.shape[-1] - 1)
        return chosen, logps.gather(1, chosen[:, None]).squeeze(1)


def _uniforms(key: int, size: int) -> np.ndarray[Any, Any]:
    return np.random.Generator(np.random.Philox(key=key)).random(size)


class _Steps:
    """The model's state while rows of equal length grow by one token at a time, and rows that ended are let go."""

    def __init__(self, model: LanguageModel, prompts: List[tuple[int, ...]]) -> None:
        self.network: Any = model.network
        self._read(torch.tensor(prompts, device=model.device), None)

    def advance(self, drawn: Tensor, going: list[int]) -> None:
        """Appends the drawn tokens of the rows in `going` and drops the others."""
        if len(going) < len(drawn):
            keep = torch.tensor(going, device=drawn.device)
            drawn = drawn[keep]
            self.cache.batch_select_indices(keep)
        self._read(drawn[:, None], self.cache)

    def _read(self, ids: Tensor, cache: Any) -> None:
        with torch.no_grad():
            out = self.network(input_ids=ids, past_key_values=cache, use_cache=True)
        self.logits, self.cache = out.logits[:, -1], out.past_key_values


def _completion(model: LanguageModel, ids: list[int], logps: list[float]) -> Completion:
    finished = bool(ids) and ids[-1] in model.end_ids
    text = model.decode(ids[:-1] if finished else ids)
    return Completion(text, tuple(ids), tuple(logps), finished, source="plain")
