"""A second source joined to each step: its own batch, its own order, its own count of tokens."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.batch import Policy
from prefopt.data.assemble import Assembler
from prefopt.data.mix import Mix, MixedLikelihood
from prefopt.data.render import Renderer, load_tokenizer
from prefopt.data.streams import Order
from prefopt.rows import Comparison, Completion, Role


@pytest.fixture
def mix(tiny_model) -> Mix:
    rows = [Comparison(prompt="p", chosen=Completion("1" * n), rejected=Completion("2")) for n in (2, 3, 4)]
    assembler = Assembler(rows, MixedLikelihood(weight=0.5), Renderer(load_tokenizer(str(tiny_model))))
    return Mix(assembler, Order(range(3), batch_size=2, seed=0))


def test_any_rows_with_a_reply_become_demonstrations(mix):
    batch = mix.step(0).batch
    assert batch.role.tolist() == [Role.DEMONSTRATION] * 2
    assert batch.counts["tokens"] == sum(len(t.completion) for t in mix.step(0).tokens)
    assert mix.seen(1) == set(mix.order.step(0))
    assert mix.seen(2) == mix.seen(50) == {0, 1, 2}


def test_the_loss_is_the_weighted_mean_negative_log_likelihood_of_its_own_tokens(mix):
    batch = mix.step(0).batch
    found = mix.algorithm.loss(batch, Policy({"logps": torch.full(batch.mask.shape, -math.log(4))}))
    assert found.value.item() == pytest.approx(0.5 * math.log(4))
    assert found.metrics["loss/nll"].item() == pytest.approx(math.log(4))
