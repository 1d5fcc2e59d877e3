"""What the last layer is spared: found by trying, and without a change to any number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt.config.models import LoraConfig
from prefopt.data.render import Tokens
from prefopt.engine.forward import Scorer, run
from prefopt.engine.lastlayer import looked_at, spared
from prefopt.engine.layout import PLAIN, Paths
from prefopt.engine.lora import attach
from prefopt.engine.models import build
from prefopt.engine.probe import probe
from prefopt.engine.recompute import prepare
from prefopt.testing.tiny import tiny_recipe

CPU = torch.device("cpu")
GROUP = [0, 0, 1]
PROMPT = tuple(range(3, 15))
TOKENS = [Tokens(PROMPT, (5, 6)), Tokens(PROMPT, (7, 8, 9)), Tokens(PROMPT[::-1], (5,))]
LLAMA = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
FAMILIES = {
    "llama": ({}, "model.layers.1.", LLAMA),
    "qwen3": ({"head_dim": 12}, "model.layers.1.", LLAMA),
    "olmo2": ({}, "model.layers.1.", LLAMA),
    "gpt_neox": ({}, "gpt_neox.layers.1.", ("attention.dense", "mlp")),
    "phi3": ({"pad_token_id": 0}, "model.layers.1.", ("self_attn.o_proj", "mlp")),
}
"""What each has besides, where its last layer is, and what can be spared there: keys and values cannot, nor what is one
product with them."""


def network(family: str, folder: Path) -> torch.nn.Module:
    recipe = tiny_recipe()
    build(
        type(recipe)(
            {**recipe.config, "model_type": family, **FAMILIES[family][0]}, recipe.tokenizer, recipe.special_tokens
        ),
        folder,
        seed=0,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_reaches_other_tokens_is_never_spared(family, tmp_path):
    found = network(family, tmp_path / "model")
    before = {name: x.clone() for name, x in found.state_dict().items()}
    _, layer, parts = FAMILIES[family]
    assert spared(found) == tuple(layer + part for part in parts)
    assert all(torch.equal(x, before[name]) for name, x in found.state_dict().items())


def test_a_layer_that_has_not_learned_yet_is_told_from_one_that_reaches_nobody(tiny_model):
    """Its output matrices are 0: nothing of what keys and values hold comes through, yet."""
    found = AutoModelForCausalLM.from_pretrained(tiny_model)
    last = found.model.layers[-1]
    with torch.no_grad():
        last.self_attn.o_proj.weight.zero_()
        last.mlp.down_proj.weight.zero_()
    assert spared(found) == tuple("model.layers.1." + part for part in LLAMA)


def test_a_gate_that_is_closed_hides_nothing(tiny_model):
    """What attention adds goes through a vector of zeros, as where a residual branch begins closed."""
    found = AutoModelForCausalLM.from_pretrained(tiny_model)
    attention = found.model.layers[-1].self_attn
    attention.gate = torch.nn.Parameter(torch.zeros(24))
    usual = attention.forward
    attention.forward = lambda *given, **more: ((all_ := usual(*given, **more))[0] * attention.gate, *all_[1:])
    assert spared(found) == tuple("model.layers.1." + part for part in LLAMA)


def test_where_no_token_depends_on_another_nothing_is_believed(tiny_model):
    found = AutoModelForCausalLM.from_pretrained(tiny_model)
    for layer in found.model.layers:
        usual = layer.self_attn.forward
        layer.self_attn.forward = lambda *given, usual=usual, **more: (torch.zeros_like(more["hidden_states"]), None)
    assert spared(found) == ()


def test_weights_of_less_than_float32_are_not_tried(tiny_model):
    assert spared(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)) == ()


@pytest.fixture
def seen(monkeypatch):
    """How many tokens the last feed-forward network was given."""
    found: list[int] = []

    def watched(network):
        mlp = network.model.layers[-1].mlp
        mlp.gate_proj.register_forward_pre_hook(lambda _, given: found.append(given[0].numel() // given[0].shape[-1]))
        return network

    return found, watched


def outcome(scorer: Scorer, want: str) -> dict[str, torch.Tensor]:
    """What is found, and the gradients of all that has one, by name."""
    found = run(scorer, TOKENS, (want,), CPU, groups=GROUP)[want]
    (found * torch.linspace(-1, 2, found.numel()).view_as(found)).sum().backward()
    return {"": found.detach()} | {name: p.grad for name, p in scorer.named_parameters() if p.grad is not None}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each to 3e-6 of its largest number, or of 1: processors sum in different orders."""
    assert found.keys() == expected.keys()
    for name, plain in expected.items():
        size = max(1.0, float(plain.abs().max()))
        torch.testing.assert_close(found[name], plain, atol=3e-6 * size, rtol=1e-5)


def adapted(path: Path) -> torch.nn.Module:
    """With adapters that have learned something."""
    network = AutoModelForCausalLM.from_pretrained(path)
    attach(network, LoraConfig(rank=4), seed=0)
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return network


def test_adapters_learn_as_on_the_plain_path(tiny_model, seen):
    counts, watched = seen
    plain, fast = (Scorer(watched(adapted(tiny_model))) for _ in range(2))
    fast.paths = probe(fast, print)
    assert fast.paths.spared == tuple("model.layers.1." + part for part in LLAMA)
    counts.clear()
    found = outcome(fast, "logps")
    assert sum(".lora_" in name for name in found) == 2 * 2 * 7  # two layers of seven matrices, two factors each
    close(found, outcome(plain, "logps"))
    assert counts == [5, 3 * 15]


def test_a_critic_learns_as_on_the_plain_path(tiny_model, seen):
    counts, watched = seen
    found = []
    for paths in (Paths("shared", tiled=True, spared=tuple("model.layers.1." + part for part in LLAMA)), PLAIN):
        critic = watched(AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1))
        torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(0))
        scorer = Scorer(AutoModelForCausalLM.from_pretrained(tiny_model))
        scorer.value_by(Scorer(critic), print)
        scorer.paths = scorer.critic.paths = paths
        found.append(outcome(scorer, "values"))
    assert {"critic.network.score.weight", "critic.network.model.layers.1.mlp.up_proj.weight"} < found[0].keys()
    close(*found)
    assert counts == [5, 3 * 15]


@pytest.mark.parametrize("layout", ["causal", "shared"])
def test_log_probabilities_and_gradients_are_those_of_the_plain_path(tiny_model, layout, seen):
    """Also where two completions are predicted by one and the same token."""
    counts, watched = seen
    found = []
    for paths in (Paths(layout, tiled=True, spared=tuple("model.layers.1." + part for part in LLAMA)), PLAIN):
        network = watched(AutoModelForCausalLM.from_pretrained(tiny_model))
        found.append(outcome(Scorer(network, paths=paths), "logps"))
    close(*found)
    predicting = 2 + 3 + 1 - (layout == "shared")  # tokens that predict one of a completion, a shared one once
    assert counts == [predicting, 3 * 15]


def test_of_a_reward_model_only_the_last_tokens_are_looked_at(tiny_model, seen):
    counts, watched = seen
    network = watched(AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1))
    paths = Paths("shared", spared=tuple("model.layers.1." + part for part in LLAMA))
    plain, fast = (
        run(Scorer(network, paths=p), TOKENS, ("scores",), CPU, groups=GROUP)["scores"] for p in (PLAIN, paths)
    )
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-5)
    assert counts == [3 * 15, 3]


def test_nothing_is_spared_where_nearly_all_is_looked_at(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    mlp = network.model.layers[-1].mlp
    for looked, changed in ((8, True), (9, False)):
        with looked_at(network, ("model.layers.1.mlp",), torch.arange(looked), (1, 10)):
            assert ("forward" in vars(mlp)) == changed
        assert "forward" not in vars(mlp)


def test_a_module_that_is_given_anything_else_makes_all_of_it(tiny_model):
    """Another number of tokens, or more than states alone."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    mlp = network.model.layers[-1].mlp
    states = torch.randn(1, 10, 24, generator=torch.Generator().manual_seed(0))
    mlp.forward = usual = lambda x, scale=1.0, forward=mlp.forward: scale * forward(x)
    with looked_at(network, ("model.layers.1.mlp",), torch.arange(3), (1, 10)) as done, torch.no_grad():
        for given, more in ((states[:, :8], {}), (states, {"scale": 2.0})):
            torch.testing.assert_close(mlp(given, **more), usual(given, **more))
        assert not done
        spared_some = mlp(states)
        torch.testing.assert_close(spared_some[:, :3], usual(states[:, :3]))
        assert not spared_some[:, 3:].any()
        assert done == {"model.layers.1.mlp"}


def test_a_forward_of_its_own_comes_back(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    mlp = network.model.layers[-1].mlp
    mlp.forward = own = mlp.forward
    with pytest.raises(KeyError), looked_at(network, ("model.layers.1.mlp",), torch.arange(3), (1, 10)):
        raise KeyError
    assert vars(mlp)["forward"] is own


def test_with_layers_computed_again_passes_with_gradient_spare_nothing(tiny_model, seen):
    counts, watched = seen
    scorer = Scorer(watched(AutoModelForCausalLM.from_pretrained(tiny_model)))
    scorer.paths = Paths("shared", tiled=True, spared=("model.layers.1.mlp",))
    scorer.recomputed = prepare(scorer.network)
    run(scorer, TOKENS, ("logps",), CPU, groups=GROUP)["logps"].sum().backward()
    with torch.no_grad():
        run(scorer, TOKENS, ("logps",), CPU, groups=GROUP)
    rows = 2 * (12 + 2 + 3)
    assert counts == [rows, rows, 5]


def test_the_probe_finds_it(tiny_model):
    paths = probe(Scorer(AutoModelForCausalLM.from_pretrained(tiny_model)), print)
    assert paths.spared == tuple("model.layers.1." + part for part in LLAMA)
