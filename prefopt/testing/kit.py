"""The conformance kit: what the engine relies on in every algorithm, as properties that can fail.

Most need no model: batches are synthetic, with random live outputs in float64. The last ones go through the engine with
a model of two layers: a property that never met the engine would not count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prefopt.batch import CONSTANT, Loss, Policy
from prefopt.components import Algorithm
from prefopt.config.yaml import dump, parse
from prefopt.errors import MissingColumn, PrefoptError
from prefopt.maths.constants import holding
from prefopt.rows import Comparison, Demonstration, Judgement, Ranking, Role, Rollout
from prefopt.testing import through
from prefopt.testing.engine import installed
from prefopt.testing.failure import ConformanceFailure, require
from prefopt.testing.rollouts import best_and_worst, in_a_later_pass
from prefopt.testing.settings import default, instance, label, others
from prefopt.testing.synthetic import Synthetic, context

PADDING = 3
EXTREME = 1e4
STEP = 1e-6
EXACT = 1e-9


def check_algorithm(algorithm: type[Algorithm] | Algorithm) -> None:
    """Checks every property. Raises `ConformanceFailure` with all that fail, one line each."""
    failures = []
    for name in PROPERTIES:
        failure = _failure(name, algorithm)
        if failure:
            failures.append(f"{name}: {failure}")
        if failure and name == "written":
            break
    if failures:
        raise ConformanceFailure("\n".join(failures))


def conformance(*algorithms: type[Algorithm] | Algorithm) -> Callable[..., None]:
    """A pytest test with one case for each algorithm and property: `test_conformance = conformance(MyMethod)`."""
    import pytest

    @pytest.mark.parametrize("name", PROPERTIES)
    @pytest.mark.parametrize("algorithm", algorithms, ids=label)
    def test(algorithm: type[Algorithm] | Algorithm, name: str) -> None:
        if name != "written" and _failure("written", algorithm):
            pytest.skip("the loss is not written yet")
        failure = _failure(name, algorithm)
        if failure:
            pytest.fail(failure, pytrace=False)

    return test


def _failure(name: str, algorithm: type[Algorithm] | Algorithm) -> str:
    try:
        PROPERTIES[name](instance(algorithm))
    except (ConformanceFailure, PrefoptError) as failure:
        return str(failure)
    return ""


def evaluate(algorithm: Algorithm, made: Synthetic) -> tuple[Loss, dict[str, Tensor]]:
    """The loss and its gradient by each live output."""
    live = {name: x.clone().requires_grad_(name not in CONSTANT) for name, x in made.outputs.items()}
    loss = algorithm.loss(made.batch, Policy(live))
    require(isinstance(loss, Loss), f"loss must return a Loss, not {type(loss).__name__}")
    require(loss.value.dim() == 0, f"loss must be a scalar, not of shape {tuple(loss.value.shape)}")
    require(loss.value.requires_grad, "the loss does not depend on any live output")
    leaves = {name: x for name, x in live.items() if x.requires_grad}
    slopes = torch.autograd.grad(loss.value, list(leaves.values()), allow_unused=True)
    none = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), slopes, strict=True))
    return loss, dict(zip(leaves, none, strict=True))


def _made(algorithm: Algorithm, **options: Any) -> Synthetic:
    try:
        return Synthetic.of(algorithm, **options)
    except LookupError as error:
        raise ConformanceFailure(str(error)) from None


# --- the loss --------------------------------------------------------------------------------------------------------


def written(algorithm: Algorithm) -> None:
    """`loss` exists."""
    try:
        evaluate(algorithm, _made(algorithm))
    except NotImplementedError as error:
        raise ConformanceFailure(str(error) or f"write {type(algorithm).__name__}.loss") from None


def round_trip(algorithm: Algorithm) -> None:
    """The settings survive a YAML file: written and read again they give an equal algorithm."""
    read = parse(dump(algorithm.model_dump(mode="json")), "settings").data
    again = type(algorithm).model_validate_json(json.dumps(read), strict=True)
    require(again == algorithm, f"settings change in a round trip: {algorithm!r} became {again!r}")


def finite(algorithm: Algorithm) -> None:
    """Loss and gradient are finite, also for live outputs of ±10,000 and for completions of probability 1."""
    for scale in (0.0, 1.0, 100.0, EXTREME):
        made = _made(algorithm, scale=scale)
        for part, precision in ((made, "float64"), (made.single(), "float32")):
            loss, gradient = evaluate(algorithm, part)
            size = f"for live outputs of size {scale:g} in {precision}"
            require(bool(loss.value.isfinite()), f"the loss is {loss.value.item()} {size}")
            for name, slope in gradient.items():
                require(bool(slope.isfinite().all()), f"the gradient by {name} is not finite {size}")


def gradient(algorithm: Algorithm) -> None:
    """The gradient is what the loss does when a live output changes, reaches every output asked for, and nothing else.

    Terms that are meant to be constant are made so by `stop_gradient`, or belong into `prepare`.
    """
    made = _made(algorithm)
    constants: list[Tensor] = []
    with holding(constants):
        _, slopes = evaluate(algorithm, made)
    for name, slope in slopes.items():
        require(bool((slope != 0).any()), f"no gradient reaches `{name}`: leave it out of needs().during")
        if slope.dim() == 2:
            outside = bool((slope[~made.batch.mask] == 0).all())
            require(outside, f"padding gets a gradient through `{name}`: reduce it with batch.sum_tokens and the like")
        expected, found = float((slope * direction(slope)).sum()), _slope_along(algorithm, made, name, constants)
        close = abs(expected - found) <= 1e-4 * max(float(slope.norm()), abs(found))
        require(
            close,
            f"the gradient by `{name}` is {expected:.6g} along a line where the loss changes by {found:.6g}; write "
            "stop_gradient(x) for what is meant to be constant",
        )


def direction(like: Tensor) -> Tensor:
    """A fixed direction of that shape."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def _slope_along(algorithm: Algorithm, made: Synthetic, name: str, constants: list[Tensor]) -> float:
    """The central difference of the loss along the direction, its declared constants held."""

    def at(distance: float) -> float:
        moved = made.outputs[name] + distance * direction(made.outputs[name])
        with torch.no_grad(), holding(constants):
            return float(algorithm.loss(made.batch, Policy({**made.outputs, name: moved})).value)

    return (at(STEP) - at(-STEP)) / (2 * STEP)


def at_the_start(algorithm: Algorithm) -> None:
    """Where the policy is the reference the loss is `loss_at_init`, whatever the settings, and a step moves completions
    as `moves` says."""
    for one in (algorithm, *(other for name in type(algorithm).model_fields for other in others(algorithm, name))):
        _starts(one)
    made = _made(algorithm, weights=(1.0,), at_reference=True)
    _, slopes = evaluate(algorithm, made)
    name = "scores" if "scores" in slopes else "logps"
    if name in slopes:
        pull = -slopes[name].reshape(len(made.batch), -1).sum(1)
        for sign, (side, index) in zip(algorithm.moves, _sides(algorithm, made).items(), strict=False):
            if sign is not None:
                _moved(pull[index], sign, side)


def _starts(algorithm: Algorithm) -> None:
    expected = algorithm.loss_at_init()
    if expected is not None:
        loss = evaluate(algorithm, _made(algorithm, weights=(1.0,), at_reference=True))[0].value.item()
        close = abs(loss - expected) <= EXACT * max(1.0, abs(expected))
        require(close, f"the loss where the policy is the reference is {loss:.9g}, not {expected:.9g}")


def _sides(algorithm: Algorithm, made: Synthetic) -> dict[str, Tensor]:
    """The better and the worse sequences, by their names."""
    role = made.batch.role
    if algorithm.eats is Rollout:
        return best_and_worst(made)
    if algorithm.eats is Ranking:
        return {"best": made.batch.ranked(torch.arange(len(role)).double())[:, 0].long()}
    names = {
        Comparison: (Role.CHOSEN, Role.REJECTED),
        Judgement: (Role.DESIRABLE, Role.UNDESIRABLE),
        Demonstration: (Role.DEMONSTRATION,),
    }
    return {r.name.lower(): (role == r).nonzero().squeeze(1) for r in names.get(algorithm.eats, ())}


def _moved(pull: Tensor, sign: int, side: str) -> None:
    pull = pull.masked_fill(abs(pull) < EXACT, 0.0)
    way = {1: "raise", -1: "lower", 0: "leave"}[sign]
    good = bool((pull == 0).all()) if sign == 0 else bool((pull * sign >= 0).all() and (pull != 0).any())
    require(good, f"where the policy is the reference a step should {way} the {side} side: see `moves`")


def swap(algorithm: Algorithm) -> None:
    """Chosen and rejected, exchanged, turn the margin round. (Not where columns are asked for on one side only.)"""
    sided = any(len(roles & {Role.CHOSEN, Role.REJECTED}) == 1 for roles in algorithm.needs().columns.values())
    if algorithm.eats is not Comparison or sided:
        return
    made = _made(algorithm)
    one, other = (evaluate(algorithm, part)[0].metrics.get("reward/margin") for part in (made, made.turned()))
    if one is not None and other is not None:
        _equal(one, -other, "reward/margin does not change its sign when chosen and rejected are exchanged")


def permutation(algorithm: Algorithm) -> None:
    """The order of groups in a batch changes nothing."""
    made = _made(algorithm)
    groups = made.batch.group.tolist()
    order = sorted(range(len(groups)), key=lambda i: (-groups[i], i))
    loss, slopes = evaluate(algorithm, made)
    other, turned = evaluate(algorithm, made.select(order))
    _equal(loss.value, other.value, "the loss depends on the order of the batch")
    for name, slope in slopes.items():
        _equal(slope[order], turned[name], f"the gradient by `{name}` depends on the order of the batch")


def microbatches(algorithm: Algorithm) -> None:
    """Loss, metrics and gradient are sums over any split of the batch by groups. (Coupled losses are exempt.)"""
    if algorithm.coupled:
        return
    made = _made(algorithm)
    whole, slopes = evaluate(algorithm, made)
    splits = _splits(made)
    parts = [evaluate(algorithm, made.select(index)) for index in splits]
    _equal(whole.value, sum(loss.value for loss, _ in parts), "the loss depends on how the batch is split")
    for name, value in whole.metrics.items():
        total = sum(loss.metrics[name] for loss, _ in parts)
        _equal(value, total, f"metric `{name}` depends on how the batch is split")
    for name, slope in slopes.items():
        total = torch.zeros_like(slope)
        for index, (_, part) in zip(splits, parts, strict=True):
            rows = torch.tensor(index)
            if slope.dim() == 2:
                total[rows, : part[name].shape[1]] += part[name]
            else:
                total[rows] += part[name]
        _equal(slope, total, f"the gradient by `{name}` depends on how the batch is split")


def _splits(made: Synthetic) -> list[list[int]]:
    """Indices of three parts of unequal size; groups stay whole."""
    groups = made.batch.group.tolist()
    return [[i for i, g in enumerate(groups) if g in part] for part in ({0}, {1, 2}, set(range(3, max(groups) + 1)))]


def _equal(a: Tensor, b: Any, message: str) -> None:
    require(torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=EXACT, atol=1e-12), f"{message}; use batch.mean")


def padding(algorithm: Algorithm) -> None:
    """More padding, whatever it holds, changes nothing."""
    made = _made(algorithm)
    loss, _ = evaluate(algorithm, made)
    wider, _ = evaluate(algorithm, _padded(made))
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
        noise = torch.randn(mask.shape, generator=generator, dtype=torch.double).to(x.dtype)
        return torch.where(mask, torch.nn.functional.pad(x, (0, PADDING)), noise)

    ids = torch.nn.functional.pad(made.batch.ids, (0, PADDING))
    columns = {name: widen(x) for name, x in made.batch.columns.items()}
    batch = replace(made.batch, ids=ids, mask=mask, columns=columns)
    return replace(made, batch=batch, outputs={name: widen(x) for name, x in made.outputs.items()})


def sizes(algorithm: Algorithm) -> None:
    """One group and three groups work like any other number, and so do completions cut to one token."""
    for groups, longest in ((1, 7), (3, 7), (3, 2)):
        loss, slopes = evaluate(algorithm, _made(algorithm, groups=groups, longest=longest))
        good = bool(loss.value.isfinite()) and all(bool(slope.isfinite().all()) for slope in slopes.values())
        require(good, f"loss or gradient of {groups} groups of at most {longest - 1} tokens is not finite")


# --- what it asks for ------------------------------------------------------------------------------------------------


def minimal_needs(algorithm: Algorithm) -> None:
    """Everything asked for in `needs` is read: what is not costs every user a forward pass."""
    needs = algorithm.needs()
    asked = [*needs.rows, *needs.columns]
    for name in asked:
        require(_reads(_Forgetful(algorithm, name)), f"needs() asks for `{name}`, but nothing reads it")
    for name in needs.during:
        require(_reads(_Forgetful(algorithm, name)), f"needs() asks for `{name}`, but the loss does not read it")


@dataclass
class _Forgetful:
    """Runs an algorithm on a batch and live outputs that lack one name."""

    algorithm: Algorithm
    name: str

    def __call__(self) -> None:
        made = _made(self.algorithm)
        raw = replace(made.raw, columns={k: x for k, x in made.raw.columns.items() if k != self.name})
        batch = self.algorithm.prepare(raw, context())
        outputs = {k: x for k, x in made.outputs.items() if k != self.name}
        self.algorithm.loss(batch.select(batch.trained), Policy(outputs))


def _reads(run: Callable[[], object]) -> bool:
    try:
        run()
    except MissingColumn:
        return True
    return False


def options(algorithm: Algorithm) -> None:
    """Every setting changes what is drawn, or loss or gradient of a fixed batch, or is refused: none is ignored."""
    algorithm = in_a_later_pass(algorithm)
    for name in type(algorithm).model_fields:
        if name in algorithm.act_elsewhere:
            continue
        tried = list(others(algorithm, name))
        if tried:
            drawn = any(other.needs().draws != algorithm.needs().draws for other in tried)
            changed = drawn or any(_differ(algorithm, other) for other in tried)
            require(changed, f"the setting `{name}` changes nothing; if it acts in `accept`, name it in act_elsewhere")


def _differ(one: Algorithm, other: Algorithm) -> bool:
    (loss, slopes), (another, turned) = (_kept(type(a), a.model_dump_json()) for a in (one, other))
    if abs(float((loss - another).detach())) > EXACT or slopes.keys() != turned.keys():
        return True
    return not all(x.shape == turned[n].shape and torch.allclose(x, turned[n], rtol=EXACT) for n, x in slopes.items())


@cache
def _kept(cls: type[Algorithm], settings: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of a third step."""
    algorithm = cls.model_validate_json(settings, strict=True)
    loss, slopes = evaluate(algorithm, later(algorithm, {}))
    return loss.value, slopes


def later(algorithm: Algorithm, state: dict[str, Tensor], **options: Any) -> Synthetic:
    """The batch of a third step, when two have left their `state`."""
    for seed in (1, 2):
        _made(algorithm, seed=seed, state=state, **options)
    return _made(algorithm, state=state, **options)


def distinct(algorithm: Algorithm) -> None:
    """No installed algorithm of another name is the same at its defaults."""
    if algorithm != default(type(algorithm)):
        return
    for entry in installed().registry.all():
        other = entry.cls
        if issubclass(other, Algorithm) and other.eats is algorithm.eats and other.name != algorithm.name:
            theirs = _sound(other)
            differ = theirs is None or _differ(in_a_later_pass(algorithm), in_a_later_pass(theirs))
            require(differ, f"it is `{other.name}` of {entry.distribution} under another name")


@cache
def _sound(cls: type[Algorithm]) -> Algorithm | None:
    """An installed algorithm at its defaults; None when it has none or is broken, which is no fault of this one."""
    made = default(cls)
    return None if made is None or _failure("written", made) else made


def state(algorithm: Algorithm) -> None:
    """What `prepare` keeps in `ctx.state` is tensors, and is all that it keeps."""
    kept: dict[str, Tensor] = {}
    losses = []
    for fresh in (False, True):
        for seed in range(3):
            again = type(algorithm).model_validate(algorithm.model_dump()) if fresh else algorithm
            made = _made(again, seed=seed, state=kept)
            kept = {name: x.clone() for name, x in _tensors(kept).items()}
        losses.append(evaluate(algorithm, made)[0].value.item())
        kept = {}
    require(losses[0] == losses[1], "an algorithm made anew goes on differently: keep what must last in ctx.state")


def _tensors(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, x in kept.items():
        require(
            isinstance(x, Tensor), f"ctx.state[{name!r}] is {type(x).__name__}, not a tensor: a checkpoint loses it"
        )
    return kept


def _properties() -> Iterator[tuple[str, Callable[[Algorithm], None]]]:
    checks = (written, round_trip, finite, gradient, at_the_start, swap, permutation, microbatches, padding, sizes)
    for check in (*checks, minimal_needs, options, distinct, state):
        yield check.__name__, check
    for name, check in vars(through).items():
        if name.startswith("engine_"):
            yield name, check


PROPERTIES = dict(_properties())
