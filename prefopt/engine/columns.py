"""What is computed without gradient for a whole step: live outputs of every sequence, and the columns a method
needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from prefopt.components import Algorithm, RolloutAlgorithm, Sampler
from prefopt.config import OptimConfig
from prefopt.data.assemble import Assembled
from prefopt.engine.forward import paths_of, run
from prefopt.engine.layout import members, units
from prefopt.engine.noise import Noise
from prefopt.engine.plan import Micro, plan
from prefopt.engine.ranks import Ranks
from prefopt.engine.reference import Reference
from prefopt.rows import Role


@dataclass
class Meter:
    """Tokens that went through models, over all ranks: real tokens, no padding."""

    forward: int = 0
    backward: int = 0
    sampled: int = 0


@dataclass
class Forwarder:
    """Runs a wrapped scorer over the sequences of a step, in microbatches, each rank its part. `noise` is for what is
    trained on: a forwarder with it serves one minibatch."""

    module: nn.Module
    ranks: Ranks
    budget: int
    dtype: str
    meter: Meter = field(default_factory=Meter)
    temperature: float = 1.0
    noise: Noise | None = None
    told: bool = False
    """Whether samples come with the log-probabilities that this would give them."""

    def plan(self, built: Assembled) -> list[Micro]:
        """This rank's microbatches."""
        paths = paths_of(self.module)
        laid = units(built.tokens, built.groups, paths if self.noise is None else paths.apart())
        return plan(laid, self.budget, self.ranks.world)[self.ranks.rank]

    def live(self, built: Assembled, index: Sequence[int], want: Collection[str]) -> dict[str, Tensor]:
        """The outputs of one microbatch, the sequences at `index`, with gradient when gradients are on."""
        groups, tokens = built.groups, [built.tokens[i] for i in index]
        noise = None if self.noise is None else partial(self.noise.added, index, [len(t) for t in tokens])
        options = (self.dtype, [groups[i] for i in index], self.temperature, noise)
        return run(self.module, tokens, want, self.ranks.device, *options)

    @torch.no_grad()
    def whole(self, built: Assembled, want: Collection[str]) -> dict[str, Tensor]:
        """The outputs of every sequence, on the CPU, the same on every rank: [N] or [N, T]."""
        shape = {name: (len(built.batch),) if name == "scores" else built.batch.mask.shape for name in want}
        out = {name: torch.zeros(shape[name]) for name in want}
        for micro in self.plan(built):
            found = self.live(built, micro.index, want)
            if not micro.idle:
                _place(out, found, micro.index)
        self.meter.forward += sum(map(len, built.tokens)) * (2 if "token_kl" in want else 1)  # with the reference's
        return {name: self.ranks.sum(out[name]) for name in sorted(out)}  # in one order on every rank


def _place(out: dict[str, Tensor], found: dict[str, Tensor], index: Sequence[int]) -> None:
    rows = torch.tensor(index)
    for name, x in found.items():
        if x.dim() == 1:
            out[name][rows] = x.cpu()
        else:
            out[name][rows, : x.shape[1]] = x.cpu()


def told(algorithm: Algorithm, sampler: Sampler, optim: OptimConfig) -> bool:
    """Whether what `sampler` says of its draws stands in for `old_logps`: samples of the policy, used for one update
    only, in the precision it is trained in. No ratio is made of them, for it is 1."""
    once = isinstance(algorithm, RolloutAlgorithm) and algorithm.on_policy
    its_own = all(draw.source == "policy" and not draw.greedy for draw in algorithm.needs().draws)
    same = sampler.tells_own_logps and optim.precision == "float32"
    return once and its_own and same and optim.forward == "fast"


def fill(built: Assembled, algorithm: Algorithm, forwarder: Forwarder, reference: Reference | None) -> Assembled:
    """The step with the columns that `needs().before` asks for, of the roles it asks for; 0 elsewhere."""
    columns: dict[str, Tensor] = {}
    for name in sorted(algorithm.needs().columns.keys() - built.batch.columns.keys()):
        index = asked(built, algorithm, name)
        part = built.select(index)
        values = torch.zeros(built.batch.mask.shape)
        if index:
            found = _column(name, part, forwarder, reference)
            values[torch.tensor(index), : found.shape[1]] = found
        columns[name] = values
    return Assembled(built.batch.with_columns(**columns), built.tokens)


def _column(name: str, part: Assembled, forwarder: Forwarder, reference: Reference | None) -> Tensor:
    if name == "reference_logps":
        assert reference is not None, "the session gives every algorithm that needs it a reference"
        return _reference_logps(part, forwarder, reference)
    if name == "old_logps" and forwarder.told and _drawn(part):
        return part.batch.sampled_logps
    output = {"old_logps": "logps", "old_values": "values"}[name]
    return forwarder.whole(part, (output,))[output]


def _drawn(part: Assembled) -> bool:
    """Whether these are samples as they were drawn."""
    samples, known = part.batch.role == Role.SAMPLE, (part.batch.sampled_logps != 0).any(1)
    return bool((samples & known).all())


def asked(built: Assembled, algorithm: Algorithm, column: str) -> list[int]:
    """The sequences whose roles the algorithm asks a column for."""
    roles = algorithm.needs().columns[column]
    return [i for i, role in enumerate(built.batch.role.tolist()) if role in roles]


def _reference_logps(part: Assembled, forwarder: Forwarder, reference: Reference) -> Tensor:
    """Each rank scores its share of the groups."""
    out = torch.zeros(part.batch.mask.shape)
    ranks = forwarder.ranks
    mine = [i for index in members(part.groups)[ranks.rank :: ranks.world] for i in index]
    groups = [part.groups[i] for i in mine]
    found = reference.logps([part.tokens[i] for i in mine], groups) if mine else []
    for i, logps in zip(mine, found, strict=True):
        out[i, : len(logps)] = logps
    forwarder.meter.forward += reference.cost(part.tokens)
    return ranks.sum(out)
