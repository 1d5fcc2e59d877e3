from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.data.render import Tokens
from prefopt.engine.forward import Scorer
from prefopt.engine.ranks import Ranks
from prefopt.engine.reference import Cached, Moving, Resident

CPU = torch.device("cpu")


@pytest.fixture
def scorer(tiny_model):
    return Scorer(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))


def sequences(count: int = 24) -> list[Tokens]:
    draw = random.Random(0)
    return [
        Tokens(*(tuple(draw.randrange(4, 60) for _ in range(draw.randint(1, 12))) for _ in range(2)))
        for _ in range(count)
    ]


def test_values_come_back_in_the_order_asked_for_whatever_the_budget(scorer):
    tokens = sequences()
    together = Resident(scorer, CPU, budget=10_000).logps(tokens)
    apart = Resident(scorer, CPU, budget=1).logps(tokens)
    for a, b, t in zip(together, apart, tokens, strict=True):
        assert a.shape == (len(t.completion),)
        assert torch.allclose(a, b, atol=1e-5)


def test_a_cached_value_has_the_same_bits_in_whatever_order_the_cache_is_filled(scorer):
    tokens = sequences()
    orders = [tokens, tokens[::-1], random.Random(1).sample(tokens, len(tokens))]
    caches = []
    for order in orders:
        cache = Cached(Resident(scorer, CPU, budget=500))
        for first in range(0, len(order), 5):
            cache.logps(order[first : first + 5])
        caches.append(cache)
    for t in tokens:
        first, *others = (cache.logps([t])[0] for cache in caches)
        assert all(torch.equal(first, other) for other in others)


def test_sharing_scores_each_sequence_once_and_outlives_the_model(scorer):
    tokens = sequences(6)
    cache = Cached(Resident(scorer, CPU, budget=500))
    assert cache.share([*tokens, tokens[0]], Ranks("cpu")) == sum(map(len, tokens))
    assert cache.share(tokens, Ranks("cpu")) == 0
    cache.close()
    expected = Resident(scorer, CPU, budget=1).logps(tokens)
    assert all(torch.equal(a, b) for a, b in zip(cache.logps(tokens), expected, strict=True))


def test_a_moving_reference_mixes_the_policy_in_at_its_steps(tiny_model, scorer):
    reference = Moving(
        Scorer(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)), CPU, 500, every=2, mix=0.25
    )
    start = {name: x.clone() for name, x in reference.state().items()}
    with torch.no_grad():
        for p in scorer.parameters():
            p.add_(1.0)
    reference.follow(scorer, step=1)
    assert all(torch.equal(x, start[name]) for name, x in reference.state().items())
    reference.follow(scorer, step=2)
    for name, x in reference.state().items():
        assert torch.allclose(x, start[name] + 0.25, atol=1e-6), name


def test_a_moving_reference_is_restored_from_its_state(tiny_model, scorer):
    def moving() -> Moving:
        network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        return Moving(Scorer(network), CPU, 500, every=1, mix=0.5)

    first, second = moving(), moving()
    with torch.no_grad():
        for p in scorer.parameters():
            p.mul_(1.5)
    first.follow(scorer, 1)
    second.load({name: x.clone() for name, x in first.state().items()})
    tokens = sequences(3)
    assert all(torch.equal(a, b) for a, b in zip(first.logps(tokens), second.logps(tokens), strict=True))
