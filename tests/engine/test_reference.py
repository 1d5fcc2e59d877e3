from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.data.render import Tokens
from prefopt.engine import fewrows
from prefopt.engine.forward import Scorer
from prefopt.engine.layout import PLAIN, Paths
from prefopt.engine.memory import keep_freed
from prefopt.engine.ranks import Ranks
from prefopt.engine.reference import Cached, Moving, Resident, fingerprint
from prefopt.engine.store import Store
from prefopt.errors import ResourceError

CPU = torch.device("cpu")
STATM = Path("/proc/self/statm")


@pytest.fixture
def scorer(tiny_model):
    return Scorer(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))


def sequences(count: int = 24) -> list[Tokens]:
    draw = random.Random(0)
    return [
        Tokens(*(tuple(draw.randrange(4, 60) for _ in range(draw.randint(1, 12))) for _ in range(2)))
        for _ in range(count)
    ]


def alone(tokens: list[Tokens]) -> range:
    """A group for each sequence."""
    return range(len(tokens))


def pairs(count: int = 12) -> tuple[list[Tokens], list[int]]:
    """Two completions for each prompt, side by side."""
    tokens = sequences(2 * count)
    both = [Tokens(tokens[i - i % 2].prompt, t.completion) for i, t in enumerate(tokens)]
    return both, [i // 2 for i in range(2 * count)]


def test_values_come_back_in_the_order_asked_for_whatever_the_budget(scorer):
    tokens = sequences()
    together = Resident(scorer, CPU, budget=10_000).logps(tokens, alone(tokens))
    apart = Resident(scorer, CPU, budget=1).logps(tokens, alone(tokens))
    for a, b, t in zip(together, apart, tokens, strict=True):
        assert a.shape == (len(t.completion),)
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("paths", [PLAIN, Paths("shared", tiled=True)])
def test_a_cached_value_has_the_same_bits_in_whatever_order_the_cache_is_filled(scorer, tmp_path, paths, monkeypatch):
    monkeypatch.setattr(fewrows, "LEAST", 1)
    scorer.paths = paths
    tokens, groups = pairs()
    orders = [list(range(12)), list(range(12))[::-1], random.Random(1).sample(range(12), 12)]
    caches = []
    for number, order in enumerate(orders):
        cache = Cached(Resident(scorer, CPU, budget=500, frozen=True), Store(tmp_path / f"{number}.sqlite"))
        for first in range(0, len(order), 5):
            index = [i for group in order[first : first + 5] for i in (2 * group, 2 * group + 1)]
            cache.logps([tokens[i] for i in index], [groups[i] for i in index])
        caches.append(cache)
    first, *others = (cache.logps(tokens, groups) for cache in caches)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_frozen_reference_packs_its_output_layer_and_says_the_same(scorer, monkeypatch):
    monkeypatch.setattr(fewrows, "LEAST", 1)
    scorer.paths = Paths("shared", tiled=True)
    tokens, groups = pairs()
    frozen = Resident(scorer, CPU, budget=100, frozen=True)
    expected = Resident(scorer, CPU, budget=100).logps(tokens, groups)
    asked, product = [], frozen.product
    frozen.product = lambda states: asked.append(len(states)) or product(states)
    for a, b in zip(frozen.logps(tokens, groups), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert sum(asked) == sum(len(t.completion) for t in tokens)
    assert scorer.product is None


def test_a_reference_on_the_plain_path_packs_nothing(scorer, monkeypatch):
    monkeypatch.setattr(fewrows, "LEAST", 1)
    assert Resident(scorer, CPU, budget=100, frozen=True).product is None
    scorer.paths = Paths("shared", tiled=True)
    assert Resident(scorer, CPU, budget=100, dtype="bfloat16", frozen=True).product is None
    assert Resident(scorer, CPU, budget=100, frozen=True).product is not None


def test_sharing_scores_each_group_once_and_outlives_the_model_and_the_process(scorer, tmp_path, monkeypatch):
    tokens = sequences(6)
    scored: list[int] = []
    original = Resident.logps
    monkeypatch.setattr(
        Resident, "logps", lambda self, part, own: scored.append(len(part)) or original(self, part, own)
    )
    cache = Cached(Resident(scorer, CPU, budget=500), Store(tmp_path / "kept.sqlite"))
    cache.share([*tokens, tokens[0]], range(7), Ranks("cpu"))
    cache.share(tokens, range(6), Ranks("cpu"))
    cache.close()
    again = Cached(Resident(scorer, CPU, budget=500), Store(tmp_path / "kept.sqlite"))
    again.share(tokens, range(6), Ranks("cpu"))
    assert scored == [1] * 6
    expected = original(Resident(scorer, CPU, budget=1), tokens, alone(tokens))
    for kept in (cache, again):
        assert all(torch.equal(a, b) for a, b in zip(kept.logps(tokens, alone(tokens)), expected, strict=True))


@pytest.mark.skipif(not STATM.exists(), reason="this system does not say what is resident")
def test_a_reference_that_is_given_up_leaves_its_memory_to_the_system(scorer, tmp_path):
    def resident_bytes() -> int:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keep_freed()
    cache = Cached(Resident(scorer, CPU, budget=100), Store(tmp_path / "reference.sqlite"))
    cache.source.weights = torch.ones(2**24)
    before = resident_bytes()
    cache.close()
    assert before - resident_bytes() > 60 * 2**20


def test_other_weights_paths_or_precision_have_keys_of_their_own(tiny_model, scorer):
    def key(dtype: str = "float32", paths: Paths = PLAIN, by: float = 0.0) -> bytes:
        network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        with torch.no_grad():
            next(network.parameters())[3, 3] += by
        return fingerprint(Resident(Scorer(network, paths=paths), CPU, 500, dtype))

    assert key() == key() == key(paths=replace(PLAIN, keep_bytes=5))
    assert len({key(), key("bfloat16"), key(paths=Paths("shared")), key(by=1e-6)}) == 4


def test_a_file_that_cannot_hold_values_is_named(tmp_path):
    (tmp_path / "kept.sqlite").write_text("something else, and long enough to be no database " * 20)
    with pytest.raises(ResourceError, match=r"cannot keep values in the file.*not a database"):
        Store(tmp_path / "kept.sqlite")


@pytest.mark.parametrize("tied", [False, True])
def test_a_moving_reference_mixes_the_policy_in_at_its_steps(tiny_model, tied):
    def scorer() -> Scorer:
        options = {"dtype": torch.float32, "tie_word_embeddings": tied}
        return Scorer(AutoModelForCausalLM.from_pretrained(tiny_model, **options))

    policy, reference = scorer(), Moving(scorer(), CPU, 500, every=2, mix=0.25)
    start = {name: x.clone() for name, x in reference.state().items()}
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    reference.follow(policy, step=1)
    assert all(torch.equal(x, start[name]) for name, x in reference.state().items())
    reference.follow(policy, step=2)
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
    assert all(
        torch.equal(a, b) for a, b in zip(first.logps(tokens, range(3)), second.logps(tokens, range(3)), strict=True)
    )
