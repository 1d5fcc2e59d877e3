"""The conformance kit fails where an algorithm breaks its promise, and says which."""

from __future__ import annotations

import pytest
import torch

from prefopt.api import Algorithm, Comparison, Loss, Needs
from prefopt.batch import COLUMNS
from prefopt.rows import Role
from prefopt.testing import ConformanceFailure, check_algorithm


class Base(Algorithm):
    """A correct method, to be broken in one place at a time."""

    name, eats = "base", Comparison
    scale: float = 1.0

    def needs(self):
        return Needs(before={"reference_logps"}, during=frozenset({"logps"}))

    def loss(self, batch, policy):
        chosen, rejected = batch.pairs(batch.sum_tokens(policy.logps - batch.reference_logps))
        value = torch.nn.functional.softplus(-(chosen - rejected))
        return Loss(batch.mean(value, "pairs"), {"margin": batch.mean((chosen - rejected).detach(), "pairs")})


def pair_margin(batch, policy):
    chosen, rejected = batch.pairs(batch.sum_tokens(policy.logps - batch.reference_logps))
    return chosen - rejected


class Unwritten(Base):
    name = "unwritten"

    def loss(self, batch, policy):
        raise NotImplementedError("write Unwritten.loss")


class OwnMean(Base):
    name = "own_mean"

    def loss(self, batch, policy):
        return Loss(torch.nn.functional.softplus(-pair_margin(batch, policy)).mean())


class OwnMetric(Base):
    name = "own_metric"

    def loss(self, batch, policy):
        return Loss(super().loss(batch, policy).value, {"accuracy": (pair_margin(batch, policy) > 0).double().mean()})


class Overflowing(Base):
    name = "overflowing"

    def loss(self, batch, policy):
        return Loss(batch.mean((1 + torch.exp(-pair_margin(batch, policy))).log(), "pairs"))


class PadsCount(Base):
    name = "pads_count"

    def loss(self, batch, policy):
        chosen, rejected = batch.pairs((policy.logps - batch.reference_logps).sum(-1))
        return Loss(batch.mean(torch.nn.functional.softplus(-(chosen - rejected)), "pairs"))


class Detached(Base):
    name = "detached"

    def loss(self, batch, policy):
        margin = pair_margin(batch, policy)
        return Loss(batch.mean(margin.detach() * margin, "pairs"))


class Greedy(Base):
    name = "greedy"

    def needs(self):
        return Needs(before={"reference_logps", "old_logps"}, during=frozenset({"logps", "entropy"}))


class RowGreedy(Base):
    name = "row_greedy"

    def needs(self):
        return Needs(before={"reference_logps"}, rows={"margin"}, during=frozenset({"logps"}))


class NoField(Base):
    name = "no_field"

    def needs(self):
        return Needs(before={"reference_logps"}, rows={"rank"}, during=frozenset({"logps"}))


class Constant(Base):
    name = "constant"

    def loss(self, batch, policy):
        return Loss(batch.reference_logps.sum())


class Vector(Base):
    name = "vector"

    def loss(self, batch, policy):
        return Loss(pair_margin(batch, policy))


class Number(Base):
    name = "number"

    def loss(self, batch, policy):
        return 3.0


class Unread(Base):
    name = "unread"
    weights: tuple[float, ...] = (1.0, float(2**60))

    def model_dump_json(self, **options):
        return '{"scale": 2.0}'


def test_a_correct_method_passes():
    check_algorithm(Base)
    check_algorithm(Base(scale=2.0))


@pytest.mark.parametrize(
    ("cls", "property_", "words"),
    [
        (Unwritten, "written", "write Unwritten.loss"),
        (OwnMean, "microbatches", "the loss depends on how the batch is split"),
        (OwnMetric, "microbatches", "metric `accuracy` depends on how the batch is split"),
        (Overflowing, "finite", "the loss is inf for live outputs of size 10000"),
        (PadsCount, "gradient", "padding gets a gradient through `logps`"),
        (PadsCount, "padding", "the loss depends on padding"),
        (Detached, "gradient", "where the loss changes by"),
        (Greedy, "gradient", "no gradient reaches `entropy`"),
        (Greedy, "minimal_needs", "asks for `old_logps`, but nothing reads it"),
        (RowGreedy, "minimal_needs", "asks for `margin`, but nothing reads it"),
        (NoField, "written", "asks for `rank`, which chosen rows lack"),
        (Constant, "written", "does not depend on any live output"),
        (Vector, "written", "loss must be a scalar, not of shape (6,)"),
        (Number, "written", "loss must return a Loss, not float"),
        (Unread, "round_trip", "settings change in a round trip"),
    ],
)
def test_a_broken_promise_is_named(cls, property_, words):
    with pytest.raises(ConformanceFailure) as caught:
        check_algorithm(cls)
    lines = [line for line in str(caught.value).splitlines() if line.startswith(f"{property_}: ")]
    assert any(words in line for line in lines), str(caught.value)


class Probing(Base):
    """Asks for a column of one role only."""

    name = "probing"

    def needs(self):
        return Needs(before={"reference_logps": {Role.CHOSEN}}, during=frozenset({"logps"}))

    def loss(self, batch, policy):
        assert batch.sum_tokens(batch.reference_logps.abs())[batch.role == Role.REJECTED].sum() == 0
        return super().loss(batch, policy)


def test_columns_come_for_the_roles_that_ask():
    check_algorithm(Probing)


def test_every_column_can_be_made_up():
    for name in COLUMNS:

        class Reader(Base):
            name = "reader"
            column: str = ""

            def needs(self):
                return Needs(before={self.column}, during=frozenset({"logps"}))

            def loss(self, batch, policy):
                return Loss(batch.mean((policy.logps - getattr(batch, self.column)) ** 2, "tokens"))

        check_algorithm(Reader(column=name))


def test_the_fixture_trains_an_algorithm(train_tiny):
    assert train_tiny(algorithm={"name": "sft"}, run={"steps": 1}).outcome == "finished"
