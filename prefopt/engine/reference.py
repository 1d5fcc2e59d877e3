"""Log-probabilities under the reference model: scored once and kept, scored each step, or under a model that moves.

A kept value is a function of its key alone: each group is scored by itself, so neither its neighbours nor the order in
which the cache was filled can change a bit of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor, nn

from prefopt.data.render import Tokens
from prefopt.engine.checkpoint import load_tied
from prefopt.engine.fewrows import packed
from prefopt.engine.forward import Scorer, run
from prefopt.engine.layout import members, units
from prefopt.engine.lora import Without, disabled
from prefopt.engine.memory import give_back
from prefopt.engine.plan import plan
from prefopt.engine.ranks import Ranks
from prefopt.engine.store import Store


class Reference(Protocol):
    """What the loop asks of a reference."""

    def logps(self, tokens: Sequence[Tokens], groups: Sequence[int]) -> list[Tensor]:
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
    """Scores groups through another reference, each by itself, and keeps the result on disk. `close` gives the model up
    once every group is kept."""

    def __init__(self, source: Resident, store: Store) -> None:
        self.source: Resident | None = source
        self.store = store
        self.salt = fingerprint(source)
        self.shared: set[bytes] = set()

    def logps(self, tokens: Sequence[Tokens], groups: Sequence[int]) -> list[Tensor]:
        places = members(groups)
        keys = [self._key([tokens[i] for i in index]) for index in places]
        kept = self.store.get(keys)
        found: dict[int, Tensor] = {}
        for key, index in zip(keys, places, strict=True):
            part = [tokens[i] for i in index]
            if key not in kept:
                kept[key] = self._score(part)
                self.store.put({key: kept[key]})
            found.update(zip(index, torch.split(kept[key], [len(t.completion) for t in part]), strict=True))
        return [found[i] for i in range(len(tokens))]

    def cost(self, tokens: Sequence[Tokens]) -> int:
        return 0

    def share(self, tokens: Sequence[Tokens], groups: Sequence[int], ranks: Ranks) -> int:
        """Scores what is missing, each rank its part, and gives every rank all of it. Returns the tokens of the groups
        that were not shared before, whether or not they were on disk: what a run costs does not depend on that."""
        keyed = ((self._key(part), part) for part in ([tokens[i] for i in index] for index in members(groups)))
        parts = {key: part for key, part in keyed if key not in self.shared}
        self.shared.update(parts)
        if not parts:
            return 0
        have = self.store.get(list(parts))
        lacking = ranks.sum(torch.tensor([float(key not in have) for key in parts]))
        missing = [key for key, ranks_without in zip(parts, lacking.tolist(), strict=True) if ranks_without]
        sizes = [sum(len(t.completion) for t in parts[key]) for key in missing]
        values = torch.zeros(sum(sizes))
        for i, (key, into) in enumerate(zip(missing, torch.split(values, sizes), strict=True)):
            if i % ranks.world == ranks.rank:
                into.copy_(self._score(parts[key]))
        self.store.put(dict(zip(missing, torch.split(ranks.sum(values), sizes), strict=True)))
        return sum(len(t) for part in parts.values() for t in part)

    def _score(self, part: Sequence[Tokens]) -> Tensor:
        assert self.source is not None, "a group was not scored before the reference was given up"
        return torch.cat(self.source.logps(part, [0] * len(part)))

    def _key(self, part: Sequence[Tokens]) -> bytes:
        return blake2b(repr([(t.prompt, t.completion) for t in part]).encode(), key=self.salt, digest_size=16).digest()

    def close(self) -> None:
        self.source = None
        give_back()

    def follow(self, policy: Scorer, step: int) -> None:
        """It stays where it is."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to restore: what is kept is on disk, and what is not is computed again, to the same bits."""


def fingerprint(source: Resident) -> bytes:
    """A hash of all that a value depends on beside its tokens: weights, layout, precision, library and device."""
    device = (
        torch.cuda.get_device_name(source.device)
        if source.device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    ways = replace(source.scorer.paths, keep_bytes=0), source.product is not None  # without a gradient nothing is kept
    place = (torch.__version__, device, torch.get_num_threads(), source.dtype, source.temperature, ways)
    found = blake2b(repr(place).encode(), digest_size=32)
    for name, x in sorted(source.scorer.network.state_dict().items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.digest()


class Resident:
    """A model in memory, without gradient."""

    def __init__(
        self,
        scorer: Scorer,
        device: torch.device,
        budget: int,
        dtype: str = "float32",
        temperature: float = 1.0,
        *,
        frozen: bool = False,
    ) -> None:
        """The output layer of a `frozen` one is packed once, where that makes it faster."""
        self.scorer, self.device, self.budget, self.dtype = scorer.to(device), device, budget, dtype
        self.temperature = temperature
        fast = frozen and dtype == "float32" and scorer.paths.tiled
        self.product = packed(scorer.network.get_output_embeddings()) if fast else None  # type: ignore[operator]

    @property
    def network(self) -> nn.Module:
        """What samples of the reference are drawn from."""
        return self.scorer.network

    @torch.no_grad()
    def logps(self, tokens: Sequence[Tokens], groups: Sequence[int]) -> list[Tensor]:
        kept: dict[int, Tensor] = {}
        for micro in plan(units(tokens, groups, self.scorer.paths), self.budget)[0]:
            part, own = [tokens[i] for i in micro.index], [groups[i] for i in micro.index]
            with self.scorer.packed(self.product):
                found = run(self.scorer, part, ("logps",), self.device, self.dtype, own, self.temperature)
            logps = found["logps"].cpu()
            kept.update({i: logps[k, : len(tokens[i].completion)] for k, i in enumerate(micro.index)})
        return [kept[i] for i in range(len(tokens))]

    def cost(self, tokens: Sequence[Tokens]) -> int:
        return sum(map(len, tokens))

    def follow(self, policy: Scorer, step: int) -> None:
        """It stays where it is."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Its weights are those it was loaded with."""


class AdapterOff(Resident):
    """The policy itself without its adapters: no second copy of its weights."""

    @cached_property
    def network(self) -> nn.Module:
        return Without(self.scorer.network)

    @torch.no_grad()
    def logps(self, tokens: Sequence[Tokens], groups: Sequence[int]) -> list[Tensor]:
        with disabled(self.scorer.network):
            return super().logps(tokens, groups)


class Moving(Resident):
    """A reference that follows the policy: every `every` steps, `reference = mix * policy + (1 - mix) * reference`.

    Gorbatovski et al. 2024, arXiv:2404.09656 (TR-DPO, soft update; `mix` 1 is the hard update).
    """

    def __init__(
        self,
        scorer: Scorer,
        device: torch.device,
        budget: int,
        dtype: str = "float32",
        temperature: float = 1.0,
        *,
        every: int,
        mix: float,
    ) -> None:
        super().__init__(scorer, device, budget, dtype, temperature)
        self.every, self.mix = every, mix

    @torch.no_grad()
    def follow(self, policy: Scorer, step: int) -> None:
        if step % self.every == 0:
            theirs = _tensors(policy.network)
            for name, own in _tensors(self.scorer.network).items():
                if own.is_floating_point():
                    own.lerp_(theirs[name].to(own), self.mix)

    def state(self) -> dict[str, Tensor]:
        return self.scorer.network.state_dict()

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_tied(self.scorer.network, tensors)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, whatever is tied to it."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
