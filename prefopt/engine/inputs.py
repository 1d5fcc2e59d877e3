"""The data side of a run: which rows it trains on in which order, which it holds out, and how they become tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from math import prod

from prefopt.components import Algorithm, Services
from prefopt.config import RunConfig
from prefopt.config.models import DataConfig, MixConfig, RowsConfig
from prefopt.data.assemble import Assembler
from prefopt.data.check import Policy, Reject, screened
from prefopt.data.mix import Mix, MixedLikelihood
from prefopt.data.render import Renderer, Tokenizer
from prefopt.data.source import verdict
from prefopt.data.streams import Order, derive, split
from prefopt.errors import ConfigError, DataError, Problem


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate on."""

    assembler: Assembler
    index: List[int]


def policy(data: RowsConfig) -> Policy:
    """What a configuration says about bad rows."""
    default = Policy(drop=data.on_bad_row == "drop")
    return default if data.max_bad_rows is None else Policy(default.drop, data.max_bad_rows)


@dataclass(frozen=True)
class Opener:
    """Makes assemblers from data sections, and keeps the rows it had to leave out."""

    tokenizer: Tokenizer
    positions: int | None
    services: Services
    samples: bool
    rejects: list[Reject] = field(default_factory=list)

    def __call__(self, data: RowsConfig, algorithm: Algorithm) -> Assembler:
        rows, rejected = screened(data.source.open(self.services), policy(data))
        self.rejects.extend(rejected)
        drop = data.on_bad_row == "drop"
        return Assembler(rows, algorithm, self.renderer(data), drop, self.samples and isinstance(data, DataConfig))

    def renderer(self, data: RowsConfig) -> Renderer:
        return Renderer(self.tokenizer, data.max_length or self.positions, data.overflow, data.train_on)


@dataclass(frozen=True)
class Inputs:
    """What a run reads: `order` says which rows each of the `total` steps sees, `assembler` makes a batch of them;
    `mix` is what is joined to each step, `rejects` the rows that cannot be used and are left out."""

    assembler: Assembler
    order: Order
    total: int
    held_out: HeldOut | None
    mix: Mix | None = None
    rejects: list[Reject] = field(default_factory=list)
    policies: tuple[Policy, ...] = (Policy(), Policy(), Policy())
    updates: int = 1
    """Updates in a step, each with rows of its own of what is mixed in."""

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer, positions: int | None, services: Services) -> Inputs:
        """Opens the data. `positions` is the most tokens the model can read. Raises `DataError` for unusable rows,
        `ConfigError` for a length the model cannot read."""
        _refuse_longer(config, positions)
        opened = Opener(tokenizer, positions, services, bool(config.draws))
        train = opened(config.data, config.algorithm)
        rows, held_out = _held_out(config, train, opened)
        order = Order(rows, config.optim.batch_size, config.run.seed)
        total = config.run.steps or max(1, round((config.run.epochs or 1.0) * order.steps_per_epoch))
        other = config.eval.data if config.eval is not None and config.eval.data is not None else config.data
        mixed = config.data.mix
        policies = (policy(config.data), policy(other), Policy() if mixed is None else policy(mixed))
        mix = None if mixed is None else _mix(mixed, config, opened)
        updates = prod(config.algorithm.passes)
        return cls(train, order, total, held_out, mix, opened.rejects, policies, updates)

    def check(self) -> None:
        """Raises `DataError` with every row that a step or the evaluation could not use. Rows that may be dropped join
        the rejects."""
        steps = range(min(self.total, self.order.steps_per_epoch))
        parts: list[tuple[Assembler, List[int]]] = []
        parts.append((self.assembler, array("q", (i for step in steps for i in self.order.step(step)))))
        parts.append((self.held_out.assembler, self.held_out.index) if self.held_out else (self.assembler, ()))
        parts.append(
            (self.mix.assembler, sorted(self.mix.seen(self.total * self.updates))) if self.mix else (self.assembler, ())
        )
        problems: list[Problem] = []
        for (assembler, index), rule in zip(parts, self.policies, strict=True):
            found = assembler.unusable(index)
            self.rejects.extend(found if rule.drop else ())
            problems += _broken(rule, [reject.problem for reject in found], len(index))
        if problems:
            raise DataError(*problems)

    def verdicts(self) -> list[str]:
        """What the rows were taken for, a line for each source."""
        lines = [f"data: {verdict(self.assembler.rows)}"]
        if self.held_out is not None and self.held_out.assembler.rows is not self.assembler.rows:
            lines.append(f"eval.data: {verdict(self.held_out.assembler.rows)}")
        return lines if self.mix is None else [*lines, f"data.mix: {verdict(self.mix.assembler.rows)}"]


def _refuse_longer(config: RunConfig, positions: int | None) -> None:
    sections: dict[str, RowsConfig | None] = {"data": config.data, "data.mix": config.data.mix}
    sections["eval.data"] = config.eval.data if config.eval is not None else None
    for name, data in sections.items():
        if positions is not None and data is not None and (data.max_length or 0) > positions:
            what = f"{data.max_length} tokens are more than the {positions} the model can read"
            raise ConfigError(what, where=f"{name}.max_length", fix="Lower it, or leave it out.")


def _broken(rule: Policy, problems: list[Problem], size: int) -> tuple[Problem, ...]:
    try:
        rule.check(problems, size)
    except DataError as error:
        return error.problems
    return ()


def _mix(data: MixConfig, config: RunConfig, opened: Opener) -> Mix:
    assembler = opened(data, MixedLikelihood(weight=data.weight))
    seed = derive(config.run.seed, "mix")
    return Mix(assembler, Order(range(len(assembler.rows)), data.batch_size or config.optim.batch_size, seed))


def _held_out(config: RunConfig, train: Assembler, opened: Opener) -> tuple[List[int], HeldOut | None]:
    """The rows to train on, and those held out."""
    size = len(train.rows)
    if config.eval is None:
        return range(size), None
    if config.eval.data is not None:
        other = opened(config.eval.data, config.algorithm)
        return range(size), HeldOut(other, range(min(len(other.rows), config.eval.rows)))
    rows, index = _share(config, size)
    return array("q", rows), HeldOut(
        Assembler(train.rows, config.algorithm, opened.renderer(config.data), train.drop, train.samples), index
    )


def _share(config: RunConfig, size: int) -> tuple[list[int], list[int]]:
    assert config.eval is not None
    held_out = min(max(1, round(config.eval.holdout * size)), config.eval.rows)
    if held_out >= size:
        raise DataError(f"{size} rows are too few to hold any out", where="eval.holdout")
    return split(size, held_out, config.run.seed)
