"""From row indices to a batch: adapt, arrange, render. Pure, so that every rank can build the same global step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefopt.batch import Batch
from prefopt.components import Algorithm
from prefopt.data.adapt import adapt
from prefopt.data.check import Reject, place
from prefopt.data.read import shortened
from prefopt.data.render import Renderer, Tokens
from prefopt.errors import DataError
from prefopt.rows import Comparison, Row, Sequence

SAMPLED = "sampled_logps"


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

    def minibatch(self, index: List[int]) -> Assembled:
        """These sequences as a step of their own: means are over them alone."""
        return Assembled(self.batch.select(index).recounted(), [self.tokens[i] for i in index])


@dataclass
class Assembler:
    """Builds steps from the rows of a source, for one algorithm."""

    rows: List[Row]
    algorithm: Algorithm
    renderer: Renderer
    drop: bool = False
    """Whether rows that cannot be used are dropped, and counted, instead of stopping the run."""
    samples: bool = False
    """Whether the rows are prompts to draw from: what is trained on is made of the draws."""

    @property
    def counts(self) -> Counter[str]:
        return self.renderer.counts

    def sequences(self, indices: Iterable[int], drop: bool = False) -> list[Sequence]:
        """The sequences of the rows at these places."""
        return self._arranged(self._taken(indices), drop)

    def _taken(self, indices: Iterable[int]) -> list[Row]:
        return [replace(self.rows[i], index=i) for i in indices]

    def _arranged(self, given: List[Row], drop: bool) -> list[Sequence]:
        """The sequences of rows, as the algorithm arranges them; with `drop`, without the rows that it refuses.

        A tie is dropped unless the algorithm asks for `preference`: it would be taken for a preference otherwise.
        """
        rows = adapt(given, self.algorithm.eats)
        if "preference" not in self.algorithm.needs().rows:
            kept = [row for row in rows if not (isinstance(row, Comparison) and row.preference == 0.5)]
            self.counts["rows/ties"] += len(rows) - len(kept)
            rows = kept
        try:
            return self.algorithm.arrange(rows)
        except DataError:
            if not drop:
                raise
        kept = [row for row in rows if self._arranges(row)]
        self.counts["rows/dropped"] += len(rows) - len(kept)
        return self.algorithm.arrange(kept)

    def _arranges(self, row: Row) -> bool:
        try:
            self.algorithm.arrange([row])
        except DataError:
            return False
        return True

    def __call__(self, indices: Iterable[int]) -> Assembled | None:
        """The step made of the rows at these places; None when nothing is left of them."""
        return self.of(self._taken(indices))

    def of(self, rows: List[Row]) -> Assembled | None:
        """The step made of these rows."""
        return self._built(rows, self.drop)

    def _built(self, rows: List[Row], drop: bool) -> Assembled | None:
        arranged = self._arranged(rows, drop)
        sequences, tokens = self.renderer.render(self._with_numbers(arranged) if drop else arranged, drop)
        return Assembled(self._batch(sequences, tokens), tokens) if sequences else None

    def _with_numbers(self, sequences: List[Sequence]) -> list[Sequence]:
        """Those whose row has every number the algorithm asks for."""
        needed = self.algorithm.needs().rows
        lacking = {s.group for s in sequences if not needed <= s.fields.keys()}
        self.counts["rows/dropped"] += len(lacking)
        return [s for s in sequences if s.group not in lacking]

    def _batch(self, sequences: List[Sequence], tokens: List[Tokens]) -> Batch:
        fields = sorted(self.algorithm.needs().rows)
        columns = {name: torch.tensor([field_of(s, name) for s in sequences], dtype=torch.float32) for name in fields}
        if self.samples:
            columns[SAMPLED] = _side_by_side([s.completion.logps or () for s in sequences], tokens)
        return Batch.build(
            [t.completion for t in tokens],
            role=[s.role for s in sequences],
            group=[s.group for s in sequences],
            weight=[s.weight for s in sequences],
            columns=columns,
            trained=[t.trained for t in tokens],
        )

    def check(self, indices: Iterable[int]) -> None:
        """Raises `DataError` with every row that cannot be used; nothing is counted."""
        found = self.unusable(indices)
        if found:
            raise DataError(*shortened([reject.problem for reject in found]))

    def unusable(self, indices: Iterable[int]) -> list[Reject]:
        """Every row that cannot be used, and why; nothing is counted."""
        found: list[Reject] = []
        before = Counter(self.counts)
        for i in indices:
            try:
                self._try(i)
            except DataError as error:
                what, where = error.problems[0], place(self.rows, i)
                found.append(
                    Reject(i, "tokens", replace(what, where=f"{where}, {what.where}" if what.where else where))
                )
        self.renderer.counts = before
        return found

    def _try(self, i: int) -> None:
        if self.samples:
            self.renderer.opening(self.rows[i].prompt)
        else:
            self._built(self._taken((i,)), drop=False)


def _side_by_side(numbers: List[List[float]], tokens: List[Tokens]) -> Tensor:
    """[N, T], 0 behind each. A sequence that nobody drew, or that is not what was drawn, has none."""
    out = torch.zeros(len(tokens), max(len(t.completion) for t in tokens))
    for row, own, whole in zip(out, numbers, tokens, strict=True):
        if len(own) == len(whole.completion):
            row[: len(own)] = torch.tensor(own)
    return out


def field_of(sequence: Sequence, name: str) -> float:
    """A number of the sequence's row. Raises `DataError` when the row does not have it."""
    if name not in sequence.fields:
        have = ", ".join(sorted(sequence.fields)) or "no numbers"
        raise DataError(f"the algorithm needs `{name}`, but the row has {have}")
    return sequence.fields[name]
