"""The conformance kit fails where an algorithm breaks its promise, and says which."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from pydantic import PrivateAttr

from prefopt.api import Algorithm, Comparison, Loss, Needs
from prefopt.batch import COLUMNS
from prefopt.errors import PrefoptError
from prefopt.maths import stop_gradient
from prefopt.rows import Role
from prefopt.testing import ConformanceFailure, check_algorithm, kit, pinned


class Base(Algorithm):
    """A correct method, to be broken in one place at a time."""

    name, eats = "base", Comparison
    scale: float = 1.0

    def needs(self):
        return Needs(before={"reference_logps"}, during=frozenset({"logps"}))

    def loss(self, batch, policy):
        chosen, rejected = batch.pairs(batch.sum_tokens(policy.logps - batch.reference_logps))
        value = torch.nn.functional.softplus(-self.scale * (chosen - rejected))
        return Loss(batch.mean(value, "pairs"), {"reward/margin": batch.mean((chosen - rejected).detach(), "pairs")})


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

    def model_dump(self, **options):
        return {"scale": 2.0}


class Stale(Base):
    name = "stale"

    def loss_at_init(self):
        return 0.5


class Backwards(Base):
    name = "backwards"

    def loss(self, batch, policy):
        return Loss(batch.mean(torch.nn.functional.softplus(pair_margin(batch, policy)), "pairs"))


class OneSided(Base):
    name = "one_sided"

    def loss(self, batch, policy):
        found = super().loss(batch, policy)
        return Loss(found.value, {"reward/margin": batch.mean(pair_margin(batch, policy).detach().abs(), "pairs")})


class Ordered(Base):
    """The first pair of a batch counts double."""

    name = "ordered"
    coupled: ClassVar[bool] = True

    def loss(self, batch, policy):
        value = torch.nn.functional.softplus(-pair_margin(batch, policy))
        first = torch.arange(len(value)) == int(batch.group[0])
        return Loss(batch.mean(value * (1 + first), "pairs"))


class Ignoring(Base):
    name = "ignoring"
    extra: float = 1.0


class Twin(Base):
    name = "twin"
    scale: float = 0.1


class Forgetful(Base):
    """Keeps what it has seen where no checkpoint finds it."""

    name = "forgetful"
    _seen: list = PrivateAttr(default_factory=list)

    def prepare(self, batch, ctx):
        self._seen.append(1.0)
        return batch.with_columns(weighted=torch.full((len(batch),), float(len(self._seen)), dtype=torch.double))

    def loss(self, batch, policy):
        chosen, _ = batch.pairs(batch.weighted)
        return Loss(batch.mean(chosen * torch.nn.functional.softplus(-pair_margin(batch, policy)), "pairs"))


class Numbers(Base):
    name = "numbers"

    def prepare(self, batch, ctx):
        ctx.state["steps"] = 3
        return batch


class Placed(Base):
    """Reads where a sequence stands in its microbatch: nothing on a synthetic batch, which is whole."""

    name = "placed"
    coupled: ClassVar[bool] = False

    def loss(self, batch, policy):
        share = len(batch) / batch.counts["sequences"]
        return Loss(share * super().loss(batch, policy).value)


class First(Base):
    """The first row of a step counts double; the groups of a synthetic batch keep their numbers, whatever the order."""

    name = "first"

    def loss(self, batch, policy):
        value = torch.nn.functional.softplus(-pair_margin(batch, policy))
        chosen, _ = batch.pairs(batch.group)
        return Loss(batch.mean(value * (1 + (chosen == 0)), "pairs"))


class Unbiased(Base):
    """Divides by one less than there are."""

    name = "unbiased"

    def loss(self, batch, policy):
        pairs = torch.tensor(float(batch.counts["pairs"]))
        return Loss(super().loss(batch, policy).value * pairs / (pairs - 1))


class Declared(Base):
    """A constant that is meant."""

    name = "declared"

    def loss(self, batch, policy):
        margin = pair_margin(batch, policy)
        return Loss(batch.mean(torch.nn.functional.softplus(-margin) * stop_gradient(margin.sigmoid()), "pairs"))


class Demanding(Base):
    """A setting that has no default."""

    name = "demanding"
    scale: float


class Guard(Base):
    """A setting that acts in `accept` alone."""

    name = "guard"
    act_elsewhere: ClassVar[frozenset[str]] = frozenset({"target"})
    target: float = 1.0


class Raising(Base):
    name = "raising"

    def loss(self, batch, policy):
        found = super().loss(batch, policy)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
            raise RuntimeError("only here")
        return found


@pytest.mark.slow
def test_a_failure_on_one_of_two_processes_is_said_and_the_next_step_is_taken():
    with pytest.raises(PrefoptError, match="on two processes: RuntimeError: only here"):
        kit.PROPERTIES["engine_ranks"](Raising())
    kit.PROPERTIES["engine_ranks"](Base())


def test_a_setting_that_acts_elsewhere_is_let_be(monkeypatch):
    kit.PROPERTIES["options"](Guard())
    monkeypatch.setattr(Guard, "act_elsewhere", frozenset())
    with pytest.raises(ConformanceFailure, match="the setting `target` changes nothing"):
        kit.PROPERTIES["options"](Guard())


def test_a_method_with_a_setting_it_must_be_given_is_checked_as_an_instance():
    for name in ("options", "distinct", "state"):
        kit.PROPERTIES[name](Demanding(scale=2.0))
    with pytest.raises(ConformanceFailure, match="pass an instance"):
        check_algorithm(Demanding)


def test_a_constant_that_is_declared_passes_and_one_that_is_not_does_not():
    kit.PROPERTIES["gradient"](Declared())
    with pytest.raises(ConformanceFailure, match="write stop_gradient"):
        kit.PROPERTIES["gradient"](Detached())


def test_a_correct_method_passes():
    check_algorithm(Base)
    check_algorithm(Base(scale=2.0))


@pytest.mark.parametrize(
    ("cls", "property_", "words"),
    [
        (Unwritten, "written", "write Unwritten.loss"),
        (OwnMean, "microbatches", "the loss depends on how the batch is split"),
        (OwnMetric, "microbatches", "metric `accuracy` depends on how the batch is split"),
        (Overflowing, "finite", "the loss is inf for live outputs of size 100 in float32"),
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
        (Stale, "at_the_start", "the loss where the policy is the reference is 0.693147181, not 0.5"),
        (Backwards, "at_the_start", "should raise the chosen side"),
        (OneSided, "swap", "reward/margin does not change its sign"),
        (Ordered, "permutation", "the loss depends on the order of the batch"),
        (Ignoring, "options", "the setting `extra` changes nothing"),
        (Twin, "distinct", "it is `dpo` of prefopt-dpo under another name"),
        (Forgetful, "state", "keep what must last in ctx.state"),
        (Numbers, "state", "is int, not a tensor"),
        (Placed, "engine_microbatches", "in many microbatches, loss/total is"),
        (Placed, "engine_ranks", "on two processes, loss/total is"),
        (First, "engine_order", "with its rows turned round, loss/total is"),
        (Unbiased, "engine_sizes", "loss/total of one row is inf"),
        (Stale, "engine_start", "the loss where the policy is the reference is 0.69314718, not 0.5"),
    ],
)
def test_a_broken_promise_is_named(cls, property_, words):
    with pytest.raises(ConformanceFailure) as caught:
        kit.PROPERTIES[property_](cls())
    assert words in str(caught.value)


def test_all_that_fails_is_said_at_once():
    with pytest.raises(ConformanceFailure) as caught:
        check_algorithm(Greedy)
    assert {line.partition(":")[0] for line in str(caught.value).splitlines()} >= {"gradient", "minimal_needs"}


def test_a_pin_holds_numbers_until_they_are_changed_on_purpose(tmp_path, monkeypatch):
    path = tmp_path / "pins.json"
    monkeypatch.setenv("PREFOPT_PIN", "1")
    pinned(path, Base, Base(scale=2.0))
    monkeypatch.delenv("PREFOPT_PIN")
    kept = json.loads(path.read_text())
    assert set(kept) == {"base", "base scale=2.0"}
    test = pinned(path, Base)
    test(Base)
    kept["base"]["loss"] += 1e-6
    path.write_text(json.dumps(kept))
    with pytest.raises(AssertionError):
        test(Base)


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
    for name in COLUMNS.keys() - {"sampled_logps"}:  # of samples alone

        class Reader(Base):
            name = "reader"
            column: str = ""
            moves: ClassVar[tuple[int, int]] = (1, 1)

            def needs(self):
                return Needs(before={self.column}, during=frozenset({"logps"}))

            def loss(self, batch, policy):
                return Loss(self.scale * batch.mean(policy.logps * (getattr(batch, self.column) - 10), "tokens"))

        check_algorithm(Reader(column=name))


def test_the_fixture_trains_an_algorithm(train_tiny):
    assert train_tiny(algorithm={"name": "sft"}, run={"steps": 1}).outcome == "finished"
