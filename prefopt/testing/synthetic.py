"""Batches made up for tests: rows of every kind, columns and live outputs drawn from a seed, in float64."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.batch import Batch, Draw, StepContext
from prefopt.components import Algorithm
from prefopt.rows import Comparison, Completion, Demonstration, Judgement, Prompt, Ranking, Role, Rollout, Row, Sequence
from prefopt.testing.rollouts import rollout

GROUPS, LONGEST = 6, 7
WEIGHTS = (1.0, 0.5, 2.0)


def context(state: dict[str, Tensor] | None = None, step: int = 0) -> StepContext:
    """A step's context whose random streams are fixed; what it warns of is recorded."""
    kept = {} if state is None else state
    said = StepContext(step, kept, lambda purpose: torch.Generator().manual_seed(step))
    said.warn = lambda message: said.record(f"warning: {message}", 1.0)
    return said


@dataclass(frozen=True)
class Synthetic:
    """A batch before and after `prepare`, what that recorded, and live outputs of the sequences that a loss sees."""

    raw: Batch
    batch: Batch
    outputs: dict[str, Tensor]
    recorded: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        seed: int = 0,
        scale: float = 1.0,
        groups: int = GROUPS,
        longest: int = LONGEST,
        weights: tuple[float, ...] = WEIGHTS,
        at_reference: bool = False,
        state: dict[str, Tensor] | None = None,
    ) -> Synthetic:
        """Rows of the kind the algorithm eats, through its own `arrange`; numbers drawn from `seed`, times `scale`.

        With `at_reference` the policy is the reference: all log-probabilities agree, no distribution has moved,
        and no score has been learned.
        """
        generator = torch.Generator().manual_seed(seed)
        needs = algorithm.needs()
        rows = [_row(algorithm.eats, i, generator, longest, needs.draws) for i in range(groups)]
        sequences = algorithm.arrange(rows)
        fields = {name: torch.tensor([_field(s, name) for s in sequences]).double() for name in sorted(needs.rows)}
        batch = Batch.build(
            [_tokens(s.completion) for s in sequences],
            role=[s.role for s in sequences],
            group=[s.group for s in sequences],
            weight=[weights[s.group % len(weights)] for s in sequences],
        )
        shape = batch.mask.shape

        def numbers(name: str) -> Tensor:
            own = "logps" if at_reference and name.endswith("logps") else name
            generator = torch.Generator().manual_seed(zlib.crc32(own.encode()) + seed)  # whatever else is asked for
            return _random(name, shape, generator, 0.0 if at_reference and name in ("token_kl", "scores") else scale)

        columns = {name: _only(numbers(name), batch, roles) for name, roles in sorted(needs.columns.items())}
        outputs = {name: numbers(name) for name in sorted(needs.during)}
        raw = replace(batch, weight=batch.weight.double()).with_columns(**fields, **columns)
        return cls.prepared(algorithm, raw, outputs, state)

    @classmethod
    def prepared(
        cls, algorithm: Algorithm, raw: Batch, outputs: dict[str, Tensor], state: dict[str, Tensor] | None = None
    ) -> Synthetic:
        """After the algorithm's `prepare`; probes are left out, as the engine does."""
        around = context(state)
        whole = cls(raw, algorithm.prepare(raw, around), outputs, around.recorded)
        batch = whole.batch
        return whole if len(batch.trained) == len(batch) else whole.select(batch.trained)

    def select(self, index: list[int]) -> Synthetic:
        part = self.batch.select(index)
        width = part.mask.shape[1]
        outputs = {name: x[index][..., :width] if x.dim() == 2 else x[index] for name, x in self.outputs.items()}
        return replace(self, batch=part, outputs=outputs)

    def single(self) -> Synthetic:
        """The same in float32, as the engine has it."""
        columns = {name: x.float() if x.is_floating_point() else x for name, x in self.batch.columns.items()}
        batch = replace(self.batch, weight=self.batch.weight.float(), columns=columns)
        return replace(self, batch=batch, outputs={name: x.float() for name, x in self.outputs.items()})

    def turned(self) -> Synthetic:
        """Chosen and rejected change places."""
        role = self.batch.role.clone()
        role[self.batch.role == Role.CHOSEN], role[self.batch.role == Role.REJECTED] = Role.REJECTED, Role.CHOSEN
        return replace(self, batch=replace(self.batch, role=role))


def _tokens(completion: Completion) -> tuple[int, ...]:
    """Its ids; where an algorithm has made a text of its own, a token for each word."""
    return completion.ids if completion.ids is not None else tuple(map(len, completion.text.split()))


def _row(kind: type[Row], index: int, generator: torch.Generator, longest: int, draws: List[Draw]) -> Row:
    """A row whose completions hold random ids and are of random length."""

    def completion(score: float = 0.0) -> Completion:
        size = int(torch.randint(1, longest, (), generator=generator))
        ids = torch.randint(1, 50, (size,), generator=generator).tolist()
        score += float(torch.rand((), generator=generator))
        return Completion(" ".join(map(str, ids)), ids=tuple(ids), score=score)

    def ranking(ranks: tuple[int, ...]) -> Ranking:
        return Ranking(**shared, completions=tuple(completion(-rank) for rank in ranks), ranks=ranks)

    shared: dict[str, Any] = {"prompt": f"prompt {index}", "index": index}
    make: dict[type[Row], Callable[[], Row]] = {
        Prompt: lambda: Prompt(**shared),
        Demonstration: lambda: Demonstration(**shared, completion=completion()),
        Comparison: lambda: Comparison(
            **shared,
            chosen=completion(),
            rejected=completion(),
            preference=(1.0, 0.75, 0.5)[index % 3],
            margin=0.1 + float(torch.rand((), generator=generator)),
        ),
        Ranking: lambda: ranking(((1, 0, 2), (0, 1), (1, 1, 0), (0, 0))[index % 4]),
        Judgement: lambda: Judgement(**shared, completion=completion(), desirable=index % 2 == 0),
        Rollout: lambda: rollout(draws, completion, **shared),
    }
    return make[kind]()


def _field(sequence: Sequence, name: str) -> float:
    if name not in sequence.fields:
        raise LookupError(f"needs().rows asks for `{name}`, which {sequence.role.name.lower()} rows lack")
    return sequence.fields[name]


def _random(name: str, shape: torch.Size, generator: torch.Generator, scale: float) -> Tensor:
    """Log-probabilities are negative, entropies and divergences positive, everything else of either sign."""
    size = shape[:1] if name == "scores" else shape
    x = torch.randn(size, generator=generator, dtype=torch.double) * scale
    if "logps" in name:
        return -x.abs()
    return x.abs() if name in ("entropy", "collision_entropy", "token_kl") else x


def _only(x: Tensor, batch: Batch, roles: frozenset[Any]) -> Tensor:
    wanted = torch.tensor([int(role) in {int(r) for r in roles} for role in batch.role.tolist()])
    return x * wanted[:, None]
