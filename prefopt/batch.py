"""Batches: what an algorithm sees. It sees completion positions only, and never padding, microbatches or ranks.

This module knows nothing about prompts, tokenizers, models or how the numbers in a batch were computed.
Shapes: N sequences, T completion positions (of the longest), P pairs, G groups, K members of the largest group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from prefopt.errors import MissingColumn, PluginError, did_you_mean
from prefopt.lazy import lazy_import
from prefopt.rows import Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

Unit: TypeAlias = Literal["tokens", "sequences", "pairs", "groups", "chosen_tokens"]
UNITS: Final[tuple[Unit, ...]] = ("tokens", "sequences", "pairs", "groups", "chosen_tokens")

TIE: Final = 1e-5
"""Rewards that differ by less are equal: sums of log-probabilities are no better than that in float32."""

COLUMNS: Final[Mapping[str, str]] = {
    "reference_logps": "[N, T] log-probabilities under the reference",
    "old_logps": "[N, T] log-probabilities under the policy before this step",
    "old_values": "[N, T] values before this step",
    "sampled_logps": "[N, T] log-probabilities that the sampler drew the tokens with",
}
OUTPUTS: Final[Mapping[str, str]] = {
    "logps": "[N, T] log-probability of each completion token",
    "entropy": "[N, T] entropy of the distribution each token was drawn from, in nats",
    "values": "[N, T] value of the state before each token",
    "token_kl": "[N, T] KL(reference || policy) of the distributions each token was drawn from, in nats",
    "collision_entropy": "[N, T] -log Σ_v p(v)² of the distribution each token was drawn from, in nats; a constant",
    "scores": "[N] scalar score of the whole sequence, read at its last token",
}
CONSTANT: Final = frozenset({"collision_entropy"})
"""Live outputs that no gradient flows through."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What to sample for each prompt: `n` completions from `source`; `mix` is the reference's share of a mixture."""

    n: int = 1
    source: Literal["policy", "reference", "mixture"] = "policy"
    mix: float = 0.0
    greedy: bool = False
    role: Role = Role.SAMPLE


Before: TypeAlias = Iterable[str] | Mapping[str, Iterable[Role]]


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks the engine for.

    draws:  what to sample before the step.
    rows:   numbers of the row wanted as `[N]` columns (`preference`, `margin`, `rank`, ...).
    before: columns computed without gradient before the step; as a mapping, for the given roles only.
    during: live outputs of the policy, with gradient.

    Sequences of role PROBE are there for `before` and `prepare`: the loss never sees them, and no count holds them.
    """

    draws: tuple[Draw, ...] = ()
    rows: frozenset[str] = frozenset()
    before: Before = frozenset()
    during: frozenset[str] = frozenset({"logps"})

    def __post_init__(self) -> None:
        before = self.before if isinstance(self.before, Mapping) else dict.fromkeys(self.before, Role)
        object.__setattr__(self, "before", {name: frozenset(roles) for name, roles in before.items()})
        object.__setattr__(self, "rows", frozenset(self.rows))
        object.__setattr__(self, "during", frozenset(self.during))
        problems = [*_unknown(self.columns, COLUMNS, "column"), *_unknown(self.during, OUTPUTS, "live output")]
        if problems:
            raise PluginError(*problems, where="needs()")

    @property
    def columns(self) -> Mapping[str, frozenset[Role]]:
        """The columns wanted before the step, each with the roles it is wanted for."""
        assert isinstance(self.before, Mapping)
        return self.before

    @property
    def reference(self) -> bool:
        """Whether there must be a reference model."""
        drawn = any(draw.source != "policy" for draw in self.draws)
        return drawn or "reference_logps" in self.columns or "token_kl" in self.during


def _unknown(asked: Iterable[str], known: Mapping[str, str], what: str) -> list[str]:
    return [f"the engine has no {what} `{name}`. {did_you_mean(name, known)}" for name in asked if name not in known]


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise, and metrics that sum to their true values over microbatches and ranks (use
    `batch.mean`)."""

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Policy:
    """The live outputs an algorithm asked for, with gradient: `policy.logps`, `policy.scores`, ..."""

    def __init__(self, outputs: Mapping[str, Tensor]) -> None:
        self.outputs = dict(outputs)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_") or name == "outputs":
            raise AttributeError(name)
        if name not in self.outputs:
            have = ", ".join(sorted(self.outputs)) or "nothing"
            raise MissingColumn(
                f"the loss read `policy.{name}`, but needs() asked for {have}",
                fix=f'Declare it: Needs(during={{"{name}"}}).' if name in OUTPUTS else did_you_mean(name, OUTPUTS),
            )
        return self.outputs[name]


@dataclass(frozen=True)
class Batch:
    """N sequences side by side.

    ids:     [N, T] completion tokens, 0 where masked.
    mask:    [N, T] True at real completion tokens that are trained on.
    role:    [N] a `Role`.
    group:   [N] sequences of the same row share a number.
    weight:  [N] multiplies the sequence's share of every mean.
    counts:  how many of each unit the whole minibatch has, over all microbatches and ranks.
    columns: `[N]` or `[N, T]` tensors without gradient, read as attributes (`batch.reference_logps`).
    """

    ids: Tensor
    mask: Tensor
    role: Tensor
    group: Tensor
    weight: Tensor
    counts: Mapping[str, float]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        completions: Sequence[Sequence[int]],
        role: Sequence[int],
        group: Sequence[int],
        weight: Sequence[float] | None = None,
        columns: Mapping[str, Tensor] | None = None,
        trained: Sequence[Sequence[bool] | None] | None = None,
    ) -> Batch:
        """A batch from token lists; its counts are those of the batch itself. `trained` says which tokens of a
        completion count, None for all; the last one always does."""
        width = max((len(c) for c in completions), default=0)
        ids = torch.zeros(len(completions), width, dtype=torch.long)
        mask = torch.zeros(len(completions), width, dtype=torch.bool)
        for i, tokens in enumerate(completions):
            ids[i, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
            spans = trained[i] if trained is not None else None
            mask[i, : len(tokens)] = True if spans is None else torch.as_tensor(spans)
        weights = torch.ones(len(completions)) if weight is None else torch.tensor(weight, dtype=torch.float32)
        batch = cls(ids, mask, torch.tensor(role), torch.tensor(group), weights, {}, dict(columns or {}))
        return batch.recounted()

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        columns = self.__dict__.get("columns", {})
        if name not in columns:
            raise MissingColumn(
                f"the algorithm read `batch.{name}`, but the batch has {', '.join(sorted(columns)) or 'no columns'}",
                fix=f'Declare it: Needs(before={{"{name}"}}).' if name in COLUMNS else f'Needs(rows={{"{name}"}})?',
            )
        return columns[name]  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return int(self.mask.shape[0])

    # --- reductions over positions ---------------------------------------------------------------------------------

    def sum_tokens(self, x: Tensor) -> Tensor:
        """[N, T] -> [N], over real tokens."""
        return x.masked_fill(~self.mask, 0.0).sum(-1)

    def mean_tokens(self, x: Tensor) -> Tensor:
        """[N, T] -> [N], over real tokens; 0 for an empty completion."""
        return self.sum_tokens(x) / self.lengths.clamp(min=1)

    def last_token(self, x: Tensor) -> Tensor:
        """[N, T] -> [N], at the last real token."""
        return x.gather(1, (self.extents - 1).clamp(min=0)[:, None]).squeeze(1)

    @cached_property
    def extents(self) -> Tensor:
        """[N] positions of each completion up to its last real token: its length, unless others speak in between."""
        places = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
        return (self.mask * places).max(-1).values if self.mask.shape[1] else self.lengths

    @cached_property
    def lengths(self) -> Tensor:
        """[N] real tokens of each completion."""
        return self.mask.sum(-1)

    # --- groups ----------------------------------------------------------------------------------------------------

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, ...] -> the rows of the chosen and of the rejected sequences, each [P, ...], pair by pair."""
        chosen, rejected = self._pair_index
        return x[chosen], x[rejected]

    @cached_property
    def _pair_index(self) -> tuple[Tensor, Tensor]:
        chosen = self._by_group_order(Role.CHOSEN)
        rejected = self._by_group_order(Role.REJECTED)
        if not torch.equal(self.group[chosen], self.group[rejected]) or len(set(self.group[chosen].tolist())) < len(
            chosen
        ):
            raise PluginError("pairs() needs exactly one chosen and one rejected sequence in each group")
        return chosen, rejected

    def _by_group_order(self, role: Role) -> Tensor:
        index = (self.role == role).nonzero().squeeze(1)
        return index[self.group[index].argsort(stable=True)]

    def by_group(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[N] -> [G, K], members in the order of the batch, `fill` where a group is smaller."""
        row, column, size = self._group_index
        out = x.new_full(size, fill)
        return out.index_put((row, column), x)

    def ranked(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[N] -> [G, K], best first, for batches of rankings."""
        if bool((self.role != Role.RANKED).any()):
            raise PluginError("ranked() needs a batch of rankings")
        return self.by_group(x, fill)

    @cached_property
    def _group_index(self) -> tuple[Tensor, Tensor, tuple[int, int]]:
        names, row = torch.unique(self.group, return_inverse=True)
        one_hot = torch.nn.functional.one_hot(row, names.numel())
        column = (one_hot.cumsum(0) * one_hot).sum(1) - 1
        return row, column, (names.numel(), int(column.max()) + 1 if len(self) else 0)

    # --- means -----------------------------------------------------------------------------------------------------

    def mean(self, x: Tensor, unit: Unit, weighted: bool = True, roles: Iterable[Role] | None = None) -> Tensor:
        """The sum of `x` over this batch, divided by the number of `unit`s in the whole minibatch over all ranks.

        Each term counts `weight` times, as a loss wants it; a metric says `weighted=False`. For tokens `roles` says
        whose tokens are summed and counted; by default those of every sequence.

        `x` is [N, T] for tokens and chosen_tokens, [N] for sequences, [P] for pairs and [G] for groups; any other
        shape raises `PluginError`. Summing the result over microbatches and ranks gives the mean, so a loss built
        from it does not depend on how the minibatch was split.
        """
        if unit not in UNITS:
            raise PluginError(f"unknown unit `{unit}`. {did_you_mean(unit, UNITS)}")
        weight, count = self._unit_weights(unit), self.counts[unit]
        if roles is not None and unit != "tokens":
            raise PluginError(f"roles say whose tokens are counted; the unit is {unit}")
        if roles is not None:
            wanted = frozenset(roles)
            weight = weight * torch.isin(self.role, torch.tensor([int(role) for role in wanted]).to(self.role))[:, None]
            count = sum(self.counts.get(f"tokens/{role.name}", 0.0) for role in wanted)
        if x.shape != weight.shape:
            raise PluginError(f"mean over {unit} needs shape {tuple(weight.shape)}, got {tuple(x.shape)}")
        used = torch.where(weight != 0, x, torch.zeros_like(x))
        return (used * (weight if weighted else weight != 0)).sum() / max(count, 1.0)

    def _unit_weights(self, unit: Unit) -> Tensor:
        if unit == "sequences":
            return self.weight
        if unit == "pairs":
            return self.weight[self._pair_index[0]]
        if unit == "groups":
            row, column, size = self._group_index
            first = column == 0
            return self.weight.new_zeros(size[0]).index_put((row[first],), self.weight[first])
        rows = self.mask if unit == "tokens" else self.mask & (self.role == Role.CHOSEN)[:, None]
        return rows * self.weight[:, None]

    def pair_metrics(self, reward: Tensor) -> dict[str, Tensor]:
        """How well `reward` [N] tells chosen from rejected: accuracy (ties, to rounding, are half), margin, means."""
        chosen, rejected = self.pairs(reward.detach())
        found = {
            "reward/accuracy": (torch.sign((chosen - rejected) * (abs(chosen - rejected) > TIE)) + 1) / 2,
            "reward/margin": chosen - rejected,
            "reward/chosen": chosen,
            "reward/rejected": rejected,
        }
        return {name: self.mean(x, "pairs", weighted=False) for name, x in found.items()}

    # --- what the engine does ---------------------------------------------------------------------------------------

    def recounted(self) -> Batch:
        """The same batch, its counts taken from itself."""
        chosen, trained = self.role == Role.CHOSEN, self.role != Role.PROBE
        counts = {
            "tokens": float(self.mask[trained].sum()),
            "sequences": float(trained.sum()),
            "pairs": float(chosen.sum()),
            "groups": float(len(set(self.group[trained].tolist()))),
            "chosen_tokens": float(self.mask[chosen].sum()),
            **{f"tokens/{role.name}": float(self.mask[self.role == role].sum()) for role in Role},
        }
        return replace(self, counts=counts)

    @property
    def trained(self) -> list[int]:
        """The sequences that a loss sees: all but probes."""
        return (self.role != Role.PROBE).nonzero().squeeze(1).tolist()

    def with_columns(self, **columns: Tensor) -> Batch:
        """The same batch with more columns."""
        return replace(self, columns={**self.columns, **columns})

    def select(self, index: Sequence[int]) -> Batch:
        """The given sequences, with the counts of the whole."""
        chosen = torch.as_tensor(index, dtype=torch.long)
        width = int(self.extents[chosen].max()) if len(chosen) else 0

        def cut(x: Tensor) -> Tensor:
            return x[chosen][:, :width] if x.dim() == 2 else x[chosen]

        columns = {name: cut(x) for name, x in self.columns.items()}
        parts = (self.role[chosen], self.group[chosen], self.weight[chosen])
        return Batch(cut(self.ids), cut(self.mask), *parts, self.counts, columns)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        columns = {name: x.to(device) for name, x in self.columns.items()}
        parts = (self.role.to(device), self.group.to(device), self.weight.to(device))
        return Batch(self.ids.to(device), self.mask.to(device), *parts, self.counts, columns)


@dataclass
class StepContext:
    """What `prepare` may use beside the batch: the step's number, named random streams, state that is checkpointed."""

    step: int
    state: MutableMapping[str, Tensor]
    make_generator: Callable[[str], torch.Generator]
    recorded: dict[str, float] = field(default_factory=dict)
    warn: Callable[[str], None] = print
    """Tells the user something, once and for the whole run."""

    def record(self, name: str, value: float | Tensor) -> None:
        """Adds a number to the step's metrics."""
        self.recorded[name] = float(value)

    def key(self, purpose: str) -> torch.Generator:
        """A generator that depends on the run's seed, the step and `purpose` alone."""
        return self.make_generator(purpose)
