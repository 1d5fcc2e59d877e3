"""The conformance kit: what the engine relies on in every algorithm, as properties that can fail.

It needs no model: batches are synthetic, with random live outputs in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.batch import Batch, Loss, Policy, StepContext
from prefopt.components import Algorithm
from prefopt.errors import MissingColumn
from prefopt.rows import Comparison, Completion, Demonstration, Judgement, Prompt, Ranking, Rollout, Row, Sequence

GROUPS, LONGEST, PADDING = 6, 7, 3
WEIGHTS = (1.0, 0.5, 2.0)
EXTREME = 1e4
STEP = 1e-6


class ConformanceFailure(AssertionError):
    """An algorithm broke a promise; the message says which, and what to do."""


def check_algorithm(algorithm: type[Algorithm] | Algorithm) -> None:
    """Checks every property. Raises `ConformanceFailure` with all that fail, one line each."""
    failures = []
    for name, check in PROPERTIES.items():
        try:
            check(_instance(algorithm))
        except ConformanceFailure as failure:
            failures.append(f"{name}: {failure}")
            if name == "written":
                break
    if failures:
        raise ConformanceFailure("\n".join(failures))


def conformance(algorithm: type[Algorithm] | Algorithm) -> Callable[..., None]:
    """A pytest test with one case for each property: `test_conformance = conformance(MyMethod)`."""
    import pytest

    @pytest.mark.parametrize("name", PROPERTIES)
    def test(name: str) -> None:
        if name != "written" and _failure("written", algorithm):
            pytest.skip("the loss is not written yet")
        failure = _failure(name, algorithm)
        if failure:
            pytest.fail(failure, pytrace=False)

    return test


def _failure(name: str, algorithm: type[Algorithm] | Algorithm) -> str:
    try:
        PROPERTIES[name](_instance(algorithm))
    except ConformanceFailure as failure:
        return str(failure)
    return ""


def _instance(algorithm: type[Algorithm] | Algorithm) -> Algorithm:
    return algorithm() if isinstance(algorithm, type) else algorithm


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConformanceFailure(message)


# --- synthetic input -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Synthetic:
    """A batch with columns, and live outputs."""

    batch: Batch
    outputs: dict[str, Tensor]

    @classmethod
    def of(cls, algorithm: Algorithm, seed: int = 0, scale: float = 1.0, groups: int = GROUPS) -> Synthetic:
        """Rows of the kind the algorithm eats, through its own `arrange`; numbers drawn from `seed`, times `scale`."""
        generator = torch.Generator().manual_seed(seed)
        rows = [_row(algorithm.eats, i, generator) for i in range(groups)]
        sequences = algorithm.arrange(rows)
        needs = algorithm.needs()
        fields = {name: torch.tensor([_field(s, name) for s in sequences]).double() for name in needs.rows}
        batch = Batch.build(
            [s.completion.ids or () for s in sequences],
            role=[s.role for s in sequences],
            group=[s.group for s in sequences],
            weight=[WEIGHTS[s.group % len(WEIGHTS)] for s in sequences],
        )
        shape = batch.mask.shape
        columns = {
            name: _only(_random(name, shape, generator, scale), batch, roles) for name, roles in needs.columns.items()
        }
        outputs = {name: _random(name, shape, generator, scale) for name in sorted(needs.during)}
        batch = replace(batch, weight=batch.weight.double()).with_columns(**fields, **columns)
        ctx = StepContext(0, {}, lambda purpose: torch.Generator().manual_seed(0))
        return cls(algorithm.prepare(batch, ctx), outputs)

    def select(self, index: list[int]) -> Synthetic:
        part = self.batch.select(index)
        width = part.mask.shape[1]
        outputs = {name: x[index][..., :width] if x.dim() == 2 else x[index] for name, x in self.outputs.items()}
        return Synthetic(part, outputs)


def _row(kind: type[Row], index: int, generator: torch.Generator) -> Row:
    """A row whose completions hold random ids and are of random length."""

    def completion() -> Completion:
        size = int(torch.randint(1, LONGEST, (), generator=generator))
        ids = torch.randint(1, 50, (size,), generator=generator).tolist()
        return Completion("x" * size, ids=tuple(ids), score=float(torch.rand((), generator=generator)))

    shared: dict[str, Any] = {"prompt": f"prompt {index}", "index": index}
    make: dict[type[Row], Callable[[], Row]] = {
        Prompt: lambda: Prompt(**shared),
        Demonstration: lambda: Demonstration(**shared, completion=completion()),
        Comparison: lambda: Comparison(
            **shared,
            chosen=completion(),
            rejected=completion(),
            preference=(1.0, 0.75, 0.5)[index % 3],
            margin=float(torch.rand((), generator=generator)),
        ),
        Ranking: lambda: Ranking(**shared, completions=(completion(), completion(), completion()), ranks=(1, 0, 2)),
        Judgement: lambda: Judgement(**shared, completion=completion(), desirable=index % 2 == 0),
        Rollout: lambda: Rollout(**shared, completions=(completion(), completion(), completion())),
    }
    return make[kind]()


def _field(sequence: Sequence, name: str) -> float:
    _require(name in sequence.fields, f"needs().rows asks for `{name}`, which {sequence.role.name.lower()} rows lack")
    return sequence.fields[name]


def _random(name: str, shape: torch.Size, generator: torch.Generator, scale: float) -> Tensor:
    """Log-probabilities are negative, entropies and divergences positive, everything else of either sign."""
    size = shape[:1] if name == "scores" else shape
    x = torch.randn(size, generator=generator, dtype=torch.double) * scale
    if "logps" in name:
        return -x.abs()
    return x.abs() if name in ("entropy", "token_kl") else x


def _only(x: Tensor, batch: Batch, roles: frozenset[Any]) -> Tensor:
    wanted = torch.tensor([int(role) in {int(r) for r in roles} for role in batch.role.tolist()])
    return x * wanted[:, None]


def _evaluate(algorithm: Algorithm, made: Synthetic) -> tuple[Loss, dict[str, Tensor]]:
    """The loss and its gradient by each live output."""
    live = {name: x.clone().requires_grad_() for name, x in made.outputs.items()}
    loss = algorithm.loss(made.batch, Policy(live))
    _require(isinstance(loss, Loss), f"loss must return a Loss, not {type(loss).__name__}")
    _require(loss.value.dim() == 0, f"loss must be a scalar, not of shape {tuple(loss.value.shape)}")
    _require(loss.value.requires_grad, "the loss does not depend on any live output")
    slopes = torch.autograd.grad(loss.value, list(live.values()), allow_unused=True)
    none = (torch.zeros_like(x) if g is None else g for x, g in zip(live.values(), slopes, strict=True))
    return loss, dict(zip(live, none, strict=True))


# --- properties ------------------------------------------------------------------------------------------------------


def written(algorithm: Algorithm) -> None:
    """`loss` exists."""
    try:
        _evaluate(algorithm, Synthetic.of(algorithm))
    except NotImplementedError as error:
        raise ConformanceFailure(str(error) or f"write {type(algorithm).__name__}.loss") from None


def round_trip(algorithm: Algorithm) -> None:
    """The settings survive a file: dumped and read again they give an equal algorithm."""
    again = type(algorithm).model_validate_json(algorithm.model_dump_json(), strict=True)
    _require(again == algorithm, f"settings change in a round trip: {algorithm!r} became {again!r}")


def finite(algorithm: Algorithm) -> None:
    """Loss and gradient are finite, also for live outputs of ±10,000 and for completions of probability 1."""
    for scale in (0.0, 1.0, EXTREME):
        loss, gradient = _evaluate(algorithm, Synthetic.of(algorithm, scale=scale))
        _require(bool(loss.value.isfinite()), f"the loss is {loss.value.item()} for live outputs of size {scale:g}")
        for name, slope in gradient.items():
            good = bool(slope.isfinite().all())
            _require(good, f"the gradient by {name} is not finite for live outputs of size {scale:g}")


def gradient(algorithm: Algorithm) -> None:
    """The gradient is what the loss does when a live output changes, reaches every output asked for, and nothing else.

    Terms that are meant to be constant (`detach`) belong into `prepare`.
    """
    made = Synthetic.of(algorithm)
    _, slopes = _evaluate(algorithm, made)
    for name, slope in slopes.items():
        _require(bool((slope != 0).any()), f"no gradient reaches `{name}`: leave it out of needs().during")
        if slope.dim() == 2:
            outside = bool((slope[~made.batch.mask] == 0).all())
            _require(outside, f"padding gets a gradient through `{name}`: reduce it with batch.sum_tokens and the like")
        expected, found = float((slope * _direction(slope)).sum()), _slope_along(algorithm, made, name)
        close = abs(expected - found) <= 1e-4 * max(float(slope.norm()), abs(found))
        _require(
            close, f"the gradient by `{name}` is {expected:.6g} along a line where the loss changes by {found:.6g}"
        )


def _direction(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def _slope_along(algorithm: Algorithm, made: Synthetic, name: str) -> float:
    """The central difference of the loss along the direction."""

    def at(distance: float) -> float:
        moved = made.outputs[name] + distance * _direction(made.outputs[name])
        with torch.no_grad():
            return float(algorithm.loss(made.batch, Policy({**made.outputs, name: moved})).value)

    return (at(STEP) - at(-STEP)) / (2 * STEP)


def microbatches(algorithm: Algorithm) -> None:
    """Loss, metrics and gradient are sums over any split of the batch by groups. (Coupled losses are exempt.)"""
    if algorithm.coupled:
        return
    made = Synthetic.of(algorithm)
    whole, slopes = _evaluate(algorithm, made)
    parts = [_evaluate(algorithm, made.select(index)) for index in _splits(made.batch)]
    _equal(whole.value, sum(loss.value for loss, _ in parts), "the loss depends on how the batch is split")
    for name, value in whole.metrics.items():
        total = sum(loss.metrics[name] for loss, _ in parts)
        _equal(value, total, f"metric `{name}` depends on how the batch is split")
    for name, slope in slopes.items():
        total = torch.zeros_like(slope)
        for index, (_, part) in zip(_splits(made.batch), parts, strict=True):
            rows = torch.tensor(index)
            if slope.dim() == 2:
                total[rows, : part[name].shape[1]] += part[name]
            else:
                total[rows] += part[name]
        _equal(slope, total, f"the gradient by `{name}` depends on how the batch is split")


def _splits(batch: Batch) -> list[list[int]]:
    """Indices of three parts of unequal size; groups stay whole."""
    groups = batch.group.tolist()
    return [[i for i, g in enumerate(groups) if g in part] for part in ({0}, {1, 2}, set(range(3, max(groups) + 1)))]


def _equal(a: Tensor, b: Any, message: str) -> None:
    _require(torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=1e-9, atol=1e-12), f"{message}; use batch.mean")


def padding(algorithm: Algorithm) -> None:
    """More padding, whatever it holds, changes nothing."""
    made = Synthetic.of(algorithm)
    loss, _ = _evaluate(algorithm, made)
    wider, _ = _evaluate(algorithm, _padded(made))
    _equal(loss.value, wider.value, "the loss depends on padding")
    for name, value in loss.metrics.items():
        _equal(value, wider.metrics[name], f"metric `{name}` depends on padding")


def _padded(made: Synthetic) -> Synthetic:
    """The same batch three positions wider; what stands in padding is random."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.nn.functional.pad(made.batch.mask, (0, PADDING))

    def widen(x: Tensor) -> Tensor:
        if x.dim() != 2:
            return x
        noise = torch.randn(mask.shape, generator=generator, dtype=x.dtype)
        return torch.where(mask, torch.nn.functional.pad(x, (0, PADDING)), noise)

    ids = torch.nn.functional.pad(made.batch.ids, (0, PADDING))
    columns = {name: widen(x) for name, x in made.batch.columns.items()}
    batch = replace(made.batch, ids=ids, mask=mask, columns=columns)
    return Synthetic(batch, {name: widen(x) for name, x in made.outputs.items()})


def minimal_needs(algorithm: Algorithm) -> None:
    """Everything asked for in `needs` is read: what is not costs every user a forward pass."""
    needs = algorithm.needs()
    asked = [*needs.rows, *needs.columns]
    for name in asked:
        _require(_reads(_Forgetful(algorithm, name)), f"needs() asks for `{name}`, but nothing reads it")
    for name in needs.during:
        _require(_reads(_Forgetful(algorithm, name)), f"needs() asks for `{name}`, but the loss does not read it")


@dataclass
class _Forgetful:
    """Runs an algorithm on a batch and live outputs that lack one name."""

    algorithm: Algorithm
    name: str

    def __call__(self) -> None:
        made = Synthetic.of(self.algorithm)
        batch = replace(made.batch, columns={k: x for k, x in made.batch.columns.items() if k != self.name})
        ctx = StepContext(0, {}, lambda purpose: torch.Generator().manual_seed(0))
        outputs = {k: x for k, x in made.outputs.items() if k != self.name}
        self.algorithm.loss(self.algorithm.prepare(batch, ctx), Policy(outputs))


def _reads(run: Callable[[], object]) -> bool:
    try:
        run()
    except MissingColumn:
        return True
    return False


def sizes(algorithm: Algorithm) -> None:
    """One group and three groups work like any other number."""
    for groups in (1, 3):
        loss, _ = _evaluate(algorithm, Synthetic.of(algorithm, groups=groups))
        _require(bool(loss.value.isfinite()), f"the loss of a batch of {groups} is {loss.value.item()}")


def _properties() -> Iterator[tuple[str, Callable[[Algorithm], None]]]:
    for check in (written, round_trip, finite, gradient, microbatches, padding, minimal_needs, sizes):
        yield check.__name__, check


PROPERTIES = dict(_properties())
