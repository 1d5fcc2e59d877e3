"""The data side of a run: which rows it trains on in which order, which it holds out, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.components import Services
from prefopt.config import DataConfig, RunConfig
from prefopt.data.assemble import Assembler
from prefopt.data.render import Renderer, Tokenizer
from prefopt.data.streams import Order, split
from prefopt.errors import ConfigError, DataError


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate on."""

    assembler: Assembler
    index: list[int]


@dataclass(frozen=True)
class Inputs:
    """What a run reads: `order` says which rows each of the `total` steps sees, `assembler` makes a batch of them."""

    assembler: Assembler
    order: Order
    total: int
    held_out: HeldOut | None

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer, positions: int | None, services: Services) -> Inputs:
        """Opens the data. `positions` is the most tokens the model can read. Raises `DataError` for unusable rows,
        `ConfigError` for a length the model cannot read."""
        _refuse_longer(config, positions)

        def assembler(data: DataConfig) -> Assembler:
            renderer = Renderer(tokenizer, data.max_length or positions, data.overflow)
            return Assembler(data.source.open(services), config.algorithm, renderer)

        train = assembler(config.data)
        rows, held_out = list(range(len(train.rows))), None
        if config.eval is not None and config.eval.data is not None:
            other = assembler(config.eval.data)
            held_out = HeldOut(other, list(range(len(other.rows)))[: config.eval.rows])
        elif config.eval is not None:
            rows, index = _held_out(config, len(rows))
            renderer = Renderer(tokenizer, train.renderer.max_length, config.data.overflow)
            held_out = HeldOut(Assembler(train.rows, config.algorithm, renderer), index)
        order = Order(rows, config.optim.batch_size, config.run.seed)
        total = config.run.steps or max(1, round((config.run.epochs or 1.0) * order.steps_per_epoch))
        return cls(train, order, total, held_out)

    def check(self) -> None:
        """Raises `DataError` with every row that a step or the evaluation could not use."""
        steps = range(min(self.total, self.order.steps_per_epoch))
        self.assembler.check(i for step in steps for i in self.order.step(step))
        if self.held_out is not None:
            self.held_out.assembler.check(self.held_out.index)


def _refuse_longer(config: RunConfig, positions: int | None) -> None:
    sections = {"data": config.data, "eval.data": config.eval.data if config.eval is not None else None}
    for name, data in sections.items():
        if positions is not None and data is not None and (data.max_length or 0) > positions:
            what = f"{data.max_length} tokens are more than the {positions} the model can read"
            raise ConfigError(what, where=f"{name}.max_length", fix="Lower it, or leave it out.")


def _held_out(config: RunConfig, size: int) -> tuple[list[int], list[int]]:
    assert config.eval is not None
    held_out = min(max(1, round(config.eval.holdout * size)), config.eval.rows)
    if held_out >= size:
        raise DataError(f"{size} rows are too few to hold any out", where="eval.holdout")
    return split(size, held_out, config.run.seed)
