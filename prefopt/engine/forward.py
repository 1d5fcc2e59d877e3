"""The scorer: one module whose forward runs backbone and head. Knows tokens and outputs; no algorithm, no rows, no
ranks.

The layout of the plain path: sequences side by side, padded on the right, the padding masked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.data.render import Tokens
from prefopt.engine.head import token_entropy, token_logps


@dataclass(frozen=True, slots=True)
class Padded:
    """Sequences as tensors. `ids`, `attention` [n, S]; `start` [n] where each completion begins; `length` [n] its
    tokens."""

    ids: Tensor
    attention: Tensor
    start: Tensor
    length: Tensor

    @classmethod
    def of(cls, tokens: Sequence[Tokens], device: torch.device) -> Padded:
        width = max(map(len, tokens))
        ids = torch.zeros(len(tokens), width, dtype=torch.long)
        attention = torch.zeros(len(tokens), width, dtype=torch.long)
        for i, t in enumerate(tokens):
            ids[i, : len(t)] = torch.tensor([*t.prompt, *t.completion])
            attention[i, : len(t)] = 1
        start = torch.tensor([len(t.prompt) for t in tokens])
        length = torch.tensor([len(t.completion) for t in tokens])
        return cls(*(x.to(device) for x in (ids, attention, start, length)))


class Scorer(nn.Module):
    """A causal language model, or a sequence classifier, with what prefopt adds to it.

    `values` adds a value head: one number for the state before each token. Dropout is off, always: policy,
    reference and value passes must agree.
    """

    def __init__(self, network: nn.Module, values: bool = False) -> None:
        super().__init__()
        self.network = network.eval()
        width = int(network.config.get_text_config().hidden_size)  # type: ignore[operator,union-attr]
        self.value_head = nn.Linear(width, 1) if values else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        start: Tensor,
        length: Tensor,
        want: Collection[str],
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """The wanted outputs: `scores` [n]; `logps`, `entropy`, `values` [n, T] with T the longest completion here.

        Positions past a completion hold 0.
        """
        if set(want) == {"scores"}:
            return {"scores": self._scores(ids, attention, start + length - 1)}
        steps = torch.arange(int(length.max()), device=ids.device)
        real = steps < length[:, None]
        here = (start[:, None] + steps).clamp(max=ids.shape[1] - 1)  # [n, T] position of each completion token
        before = (here - 1).clamp(min=0)
        out = self.network(input_ids=ids, attention_mask=attention, output_hidden_states=self.value_head is not None)
        found = {}
        if {"logps", "entropy"} & set(want):
            logits = out.logits.gather(1, before[..., None].expand(-1, -1, out.logits.shape[-1]))
            if "logps" in want:
                found["logps"] = token_logps(logits, ids.gather(1, here), temperature)
            if "entropy" in want:
                found["entropy"] = token_entropy(logits, temperature)
        if "values" in want:
            found["values"] = self._values(out.hidden_states[-1], before)
        return {name: x.masked_fill(~real, 0.0) for name, x in found.items()}

    def _values(self, hidden: Tensor, before: Tensor) -> Tensor:
        assert self.value_head is not None, "the scorer was built without a value head"
        states = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.value_head(states.float()).squeeze(-1)  # type: ignore[no-any-return]

    def _scores(self, ids: Tensor, attention: Tensor, last: Tensor) -> Tensor:
        """The score at the last real token, found by position and never by comparing with a padding id."""
        backbone: Any = self.network.base_model
        hidden = backbone(input_ids=ids, attention_mask=attention).last_hidden_state
        state = hidden[torch.arange(len(ids), device=ids.device), last]
        return self.network.score(state).float().squeeze(-1)  # type: ignore[operator,no-any-return]


def precision(device: torch.device, name: str) -> AbstractContextManager[Any]:
    """Autocast for `bfloat16`; nothing for `float32`."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()


def run(
    module: nn.Module, tokens: Sequence[Tokens], want: Collection[str], device: torch.device, dtype: str = "float32"
) -> dict[str, Tensor]:
    """The wanted outputs for these sequences, through `module` (a scorer, wrapped or not)."""
    padded = Padded.of(tokens, device)
    with precision(device, dtype):
        outputs: dict[str, Tensor] = module(padded.ids, padded.attention, padded.start, padded.length, tuple(want))
    return outputs
