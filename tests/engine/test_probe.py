"""Fast paths are used where they hold and nowhere else."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt.engine.forward import Scorer
from prefopt.engine.probe import probe


@pytest.fixture
def network(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def probed(network) -> tuple[tuple[str, bool], list[str]]:
    heard: list[str] = []
    paths = probe(Scorer(network), heard.append)
    return (paths.layout, paths.tiled), heard


def test_the_fastest_paths_hold_for_a_usual_model(network, tiny_model):
    assert probed(network) == (("shared", True), [])
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    assert probed(classifier) == (("shared", True), [])


def test_a_head_that_does_more_than_it_says_is_not_tiled(network):
    network.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    chosen, heard = probed(network)
    assert chosen == ("shared", False)
    assert "the shared, tiled path is not used for this model: it differs by" in heard[0]


def test_a_model_that_ignores_positions_shares_nothing(network):
    model = network.model
    original = model.forward
    model.forward = lambda *args, position_ids=None, **kwargs: original(*args, **kwargs)
    chosen, heard = probed(network)
    assert chosen == ("causal", True)
    assert len(heard) == 1


def test_a_model_that_looks_ahead_takes_the_plain_path(network):
    mix = lambda module, inputs, output: output + 0.1 * output.flip(1)  # noqa: E731
    network.model.layers[0].mlp.register_forward_hook(mix)
    assert probed(network)[0] == ("padded", False)


def test_a_model_that_refuses_is_left_on_the_path_it_takes(network):
    network.config.layer_types = ["chunked_attention", "full_attention"]
    chosen, heard = probed(network)
    assert chosen == ("causal", True)
    assert "NotImplementedError: no mask is known for layers of type chunked_attention" in heard[0]


def test_a_probe_leaves_no_trace(network):
    network.config.sliding_window = 77
    scorer = Scorer(network)
    before = scorer.paths
    probe(scorer, print)
    assert scorer.paths == before
    assert network.config.sliding_window == 77
    assert all(p.grad is None for p in scorer.parameters())


def test_what_is_kept_of_logits_depends_on_the_size_of_the_model_not_on_its_vocabulary(network, monkeypatch):
    assert probe(Scorer(network), print).keep_bytes == 64 << 20
    assert probe(Scorer(network), print, 0).keep_bytes == 0
    whole, words = sum(p.numel() for p in network.parameters()), network.lm_head.weight.numel()
    tied = network.lm_head.weight is network.model.embed_tokens.weight
    monkeypatch.setattr("prefopt.engine.probe.KEPT", (0, 256 << 20))
    assert probe(Scorer(network), print).keep_bytes == whole - words * (1 if tied else 2)
    monkeypatch.setattr("prefopt.engine.probe.KEPT", (0, 100))
    assert probe(Scorer(network), print).keep_bytes == 100
