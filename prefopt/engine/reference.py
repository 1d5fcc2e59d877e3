"""Log-probabilities under the reference model: scored once and kept, scored each step, or under a model that moves.

A kept value is a function of its key alone: each sequence is scored by itself, so neither its neighbours nor the
order in which the cache was filled can change a bit of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from prefopt.data.render import Tokens
from prefopt.engine.checkpoint import load_tied
from prefopt.engine.forward import Scorer, run
from prefopt.engine.plan import plan
from prefopt.engine.ranks import Ranks


class Reference(Protocol):
    """What the loop asks of a reference."""

    def logps(self, tokens: Sequence[Tokens]) -> list[Tensor]:
        """The log-probabilities of each completion's tokens, [T_i] each, on the CPU."""

    def cost(self, tokens: Sequence[Tokens]) -> int:
        """How many tokens a step with these sequences sends through the reference."""

    def follow(self, policy: Scorer, step: int) -> None:
        """Called after each step."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restores it."""


class Cached:
    """Scores through another reference and keeps the result. `close` gives the model up once every sequence is kept."""

    def __init__(self, source: Resident) -> None:
        self.source: Resident | None = source
        self.kept: dict[Tokens, Tensor] = {}

    def logps(self, tokens: Sequence[Tokens]) -> list[Tensor]:
        for t in tokens:
            if t not in self.kept:
                assert self.source is not None, "a sequence was not scored before the reference was given up"
                self.kept[t] = self.source.logps([t])[0]
        return [self.kept[t] for t in tokens]

    def cost(self, tokens: Sequence[Tokens]) -> int:
        return 0

    def share(self, tokens: Sequence[Tokens], ranks: Ranks) -> int:
        """Scores what is missing among `tokens`, each rank its part, and gives every rank all of it; returns how many
        tokens that took."""
        missing = list(dict.fromkeys(t for t in tokens if t not in self.kept))
        if not missing:
            return 0
        column = torch.zeros(len(missing), max(len(t.completion) for t in missing))
        for i in range(ranks.rank, len(missing), ranks.world):
            column[i, : len(missing[i].completion)] = self.logps([missing[i]])[0]
        column = ranks.sum(column)
        self.kept.update({t: column[i, : len(t.completion)].clone() for i, t in enumerate(missing)})
        return sum(map(len, missing))

    def close(self) -> None:
        self.source = None

    def follow(self, policy: Scorer, step: int) -> None:
        """It stays where it is."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to restore: values are computed again, to the same bits."""


class Resident:
    """A model in memory, without gradient."""

    def __init__(self, scorer: Scorer, device: torch.device, budget: int, dtype: str = "float32") -> None:
        self.scorer, self.device, self.budget, self.dtype = scorer.to(device), device, budget, dtype

    @torch.no_grad()
    def logps(self, tokens: Sequence[Tokens]) -> list[Tensor]:
        kept: dict[int, Tensor] = {}
        for micro in plan(list(map(len, tokens)), range(len(tokens)), self.budget)[0]:
            part = [tokens[i] for i in micro.index]
            found = run(self.scorer, part, ("logps",), self.device, self.dtype)["logps"].cpu()
            kept.update({i: found[k, : len(tokens[i].completion)] for k, i in enumerate(micro.index)})
        return [kept[i] for i in range(len(tokens))]

    def cost(self, tokens: Sequence[Tokens]) -> int:
        return sum(map(len, tokens))

    def follow(self, policy: Scorer, step: int) -> None:
        """It stays where it is."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Its weights are those it was loaded with."""


class Moving(Resident):
    """A reference that follows the policy: every `every` steps, `reference = mix * policy + (1 - mix) * reference`.

    Gorbatovski et al. 2024, arXiv:2404.09656 (TR-DPO, soft update; `mix` 1 is the hard update).
    """

    def __init__(
        self, scorer: Scorer, device: torch.device, budget: int, dtype: str = "float32", *, every: int, mix: float
    ) -> None:
        super().__init__(scorer, device, budget, dtype)
        self.every, self.mix = every, mix

    @torch.no_grad()
    def follow(self, policy: Scorer, step: int) -> None:
        if step % self.every == 0:
            theirs = policy.network.state_dict()
            for name, own in self.scorer.network.state_dict().items():
                if own.is_floating_point():
                    own.lerp_(theirs[name].to(own), self.mix)

    def state(self) -> dict[str, Tensor]:
        return self.scorer.network.state_dict()

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_tied(self.scorer.network, tensors)
