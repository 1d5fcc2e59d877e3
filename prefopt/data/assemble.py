"""From row indices to a batch: adapt, arrange, render. Pure, so that every rank can build the same global step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace

import torch

from prefopt.batch import Batch
from prefopt.components import Algorithm
from prefopt.data.adapt import adapt
from prefopt.data.read import shortened
from prefopt.data.render import Renderer, Tokens
from prefopt.errors import DataError, Problem
from prefopt.rows import Comparison, Row, Sequence


@dataclass(frozen=True, slots=True)
class Assembled:
    """A batch, and the tokens of its sequences in the same order."""

    batch: Batch
    tokens: list[Tokens]

    @property
    def groups(self) -> list[int]:
        """The group of each sequence."""
        return self.batch.group.tolist()

    def select(self, index: List[int]) -> Assembled:
        return Assembled(self.batch.select(index), [self.tokens[i] for i in index])


@dataclass
class Assembler:
    """Builds steps from the rows of a source, for one algorithm."""

    rows: List[Row]
    algorithm: Algorithm
    renderer: Renderer

    @property
    def counts(self) -> Counter[str]:
        return self.renderer.counts

    def sequences(self, indices: Iterable[int]) -> list[Sequence]:
        """The sequences of the given rows, as the algorithm arranges them.

        A tie is dropped unless the algorithm asks for `preference`: it would be taken for a preference otherwise.
        """
        rows = adapt([replace(self.rows[i], index=i) for i in indices], self.algorithm.eats)
        if "preference" not in self.algorithm.needs().rows:
            kept = [row for row in rows if not (isinstance(row, Comparison) and row.preference == 0.5)]
            self.counts["rows/ties"] += len(rows) - len(kept)
            rows = kept
        return self.algorithm.arrange(rows)

    def __call__(self, indices: Iterable[int]) -> Assembled | None:
        """The step made of these rows; None when nothing is left of them."""
        sequences, tokens = self.renderer.render(self.sequences(indices))
        return Assembled(self._batch(sequences, tokens), tokens) if sequences else None

    def _batch(self, sequences: List[Sequence], tokens: List[Tokens]) -> Batch:
        fields = sorted(self.algorithm.needs().rows)
        columns = {name: torch.tensor([field_of(s, name) for s in sequences], dtype=torch.float32) for name in fields}
        return Batch.build(
            [t.completion for t in tokens],
            role=[s.role for s in sequences],
            group=[s.group for s in sequences],
            weight=[s.weight for s in sequences],
            columns=columns,
        )

    def check(self, indices: Iterable[int]) -> None:
        """Raises `DataError` with every row that cannot be used; nothing is counted."""
        problems: list[Problem] = []
        before = Counter(self.counts)
        for i in indices:
            try:
                self((i,))
            except DataError as error:
                problems += [replace(p, where=f"row {i}, {p.where}" if p.where else f"row {i}") for p in error.problems]
        self.renderer.counts = before
        if problems:
            raise DataError(*shortened(problems))


def field_of(sequence: Sequence, name: str) -> float:
    """A number of the sequence's row. Raises `DataError` when the row does not have it."""
    if name not in sequence.fields:
        have = ", ".join(sorted(sequence.fields)) or "no numbers"
        raise DataError(f"the algorithm needs `{name}`, but the row has {have}")
    return sequence.fields[name]
