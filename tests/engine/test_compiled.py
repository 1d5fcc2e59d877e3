"""Compiled steps: the text of one row after the other, whatever rows there are, and what a run says without them."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch._inductor import config
from transformers import AutoModelForCausalLM

from prefopt.api import Request
from prefopt.builtin.continuous import Continuous
from prefopt.builtin.samplers import Plain
from prefopt.config import LoraConfig, ModelConfig
from prefopt.engine import compiled, fewrows
from prefopt.engine.arena import disagreement
from prefopt.engine.compiled import Compiled
from prefopt.engine.kernels import Panels
from prefopt.engine.lora import Without
from prefopt.engine.models import load_causal, open_model
from prefopt.engine.shared import Shared
from prefopt.testing.tiny import build_tiny, train_on

CPU = torch.device("cpu")
PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13), (5, 6)]
REQUESTS = [Request(PROMPTS[i // 4 % 4], 100 + i) for i in range(17)]


@pytest.fixture(autouse=True)
def matrices_of_any_size_are_packed(monkeypatch):
    monkeypatch.setattr(fewrows, "LEAST", 1)


@pytest.fixture
def compilings(monkeypatch):
    """The networks of which steps were compiled."""
    found = []
    compute = compiled._compiled
    monkeypatch.setattr(compiled, "_compiled", lambda arena, *told: (found.append(arena), compute(arena, *told))[1])
    return found


def texts(sampler, model) -> list[tuple[int, ...]]:
    return [c.ids for _, c in sorted(sampler.open(model)(REQUESTS), key=lambda pair: pair[0])]


def opened(folder, **more):
    return replace(open_model(str(folder), CPU, pytest.fail), compiled=True, **more)


def same_texts(folder) -> None:
    """While rows end, others begin, and one is left at the end."""
    model = opened(folder)
    assert type(model.arena(2, 2, 2)) is Compiled
    found = texts(Continuous(max_new_tokens=12, slots=7), model)
    assert found == texts(Plain(max_new_tokens=12), model)
    assert len({len(ids) for ids in found}) > 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_compiled_steps_draw_the_text_of_the_plain_sampler(tmp_path, family):
    build_tiny(tmp_path / family, model_type=family)
    same_texts(tmp_path / family)


def test_compiled_steps_of_a_single_column(tiny_model, compilings):
    """Of the second wave of rows: they have one token, and nothing was drawn for them."""
    model, requests = opened(tiny_model), [Request((5 + i,), i) for i in range(8)]
    found, expected = (
        sorted((i, c.ids) for i, c in sampler.open(model)(requests))
        for sampler in (Continuous(max_new_tokens=2, slots=4, refill=False), Plain(max_new_tokens=2))
    )
    assert found == expected
    assert len(compilings) == 1


@pytest.mark.slow
def test_they_do_so_on_every_architecture(architecture):
    if "gemma2" in architecture.parent.name:
        pytest.skip("its attention is eager")
    same_texts(architecture)


def test_a_step_is_compiled_once_and_follows_the_weights(tiny_model, compilings):
    model = opened(tiny_model)
    sampler = Continuous(max_new_tokens=12, slots=7)
    before = texts(sampler, model)
    with torch.no_grad():
        for p in model.network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    found = texts(sampler, model)
    assert found == texts(Plain(max_new_tokens=12), model)
    assert found != before
    assert len(compilings) == 1


def test_steps_are_compiled_with_adapters_that_are_on_or_off(tiny_model, compilings):
    network = load_causal(ModelConfig(path=str(tiny_model), lora=LoraConfig(rank=2)))
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    model = opened(tiny_model)
    base = texts(Plain(max_new_tokens=12), model)
    adapted = replace(model, network=network)
    found = texts(Continuous(max_new_tokens=12, slots=7), adapted)
    assert found == texts(Plain(max_new_tokens=12), adapted) != base
    assert len(compilings) == 1
    trained = [p.requires_grad for p in network.parameters()]
    without = replace(model, network=Without(network))
    assert texts(Continuous(max_new_tokens=12, slots=7), without) == base
    assert texts(Continuous(max_new_tokens=12, slots=7), adapted) == found
    assert len(compilings) == 2
    assert [p.requires_grad for p in network.parameters()] == trained


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_logits_are_those_of_rows_read_whole(tiny_model, rows):
    """To 1e-5, at the positions of rows of different lengths; the first step, which is not compiled, is left out."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    arena = Compiled(network, rows, 5, 4)
    prompts = [PROMPTS[i % 4] for i in range(rows)]
    arena.read(prompts, list(range(rows)))
    for k in range(3):
        tokens = torch.arange(rows) + 5 + k
        places = torch.tensor([len(prompt) for prompt in prompts])
        logits = arena.advance(tokens, places, int(places.max()) + 1)
        assert (arena.program is None) == (k == 0)
        assert {type(product) for product in arena.few_rows.products} == {Panels}
        prompts = [(*prompt, int(token)) for prompt, token in zip(prompts, tokens, strict=True)]
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            assert torch.allclose(logits[row], network(torch.tensor([prompt])).logits[0, -1], atol=1e-5)


def test_the_masks_of_sliding_and_full_layers_are_both_looked_at(tmp_path):
    build_tiny(tmp_path / "qwen2", model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2")
    assert disagreement(network, Compiled) is None
    program = compiled._known[network]
    assert program.wanted == (True, True, True, True)


def told_in_two_steps(maker, network) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """What is heard of the products of a single row: layers, marks and outputs."""
    arena, told = maker(network, 1, 5, 4), []
    names = {p: name for name, p in network.named_parameters(remove_duplicate=False)}
    arena.few_rows.heard = lambda weight, marks, output: told.append((names[weight], marks, output.clone()))
    arena.read([(5, 6, 7)], [0])
    for place, token in ((3, 8), (4, 9)):
        arena.advance(torch.tensor([token]), torch.tensor([place]), place + 1)
    return told


def test_of_a_single_row_that_is_there_twice_is_told_once(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    for one, other in zip(*(told_in_two_steps(maker, network) for maker in (Compiled, Shared)), strict=True):
        assert one[0] == other[0]
        for x, y in zip(one[1:], other[1:], strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert Compiled.knows(network)


def test_a_model_is_compiled_for_those_alone_who_want_that(tiny_model, compilings):
    model = opened(tiny_model)
    usual = replace(model, compiled=False)
    assert [type(x.arena(2, 2, 2)) for x in (model, usual, model)] == [Compiled, Shared, Compiled]
    assert len(compilings) == 1


def test_what_a_step_changes_in_a_model_is_changed_by_compiled_steps(tiny_model):
    model = opened(tiny_model)
    model.network.register_buffer("steps", torch.zeros(1))
    model.network.register_forward_hook(lambda network, *_: (network.steps.add_(1), None)[1])
    arena = model.arena(1, 2, 4)
    arena.read([(5, 6)], [0])
    before = float(model.network.steps)
    for k in range(3):
        arena.advance(torch.tensor([7]), torch.tensor([2 + k]), 3 + k)
    assert arena.program is not None
    assert float(model.network.steps) == before + 3


def test_a_network_is_let_go_with_its_program(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert disagreement(network, Compiled) is None
    kept = [weakref.ref(network), weakref.ref(compiled._known[network].compute)]
    del network
    gc.collect()
    assert [x() for x in kept] == [None, None]


SECTIONS = {
    "algorithm": {"name": "rloo", "n": 4, "beta": 0.05},
    "reward": {"name": "length", "unit": "characters", "maximum": 3, "margin": 3},
    "sampler": {"name": "continuous", "max_new_tokens": 6},
    "reference": {"mode": "resident"},
    "optim": {"lr": 1e-5, "batch_size": 8},
    "run": {"steps": 2},
}
"""At a small rate: the first update of AdamW makes whole ones of gradients that are nothing but rounding."""


def trained(model, folder, capsys, **rollout) -> tuple[list[dict], str]:
    capsys.readouterr()
    result = train_on(model, folder, {**SECTIONS, "rollout": rollout})
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return lines, capsys.readouterr().out


def test_a_run_is_the_same_up_to_rounding_and_reuses_what_compiled_steps_computed(
    tiny_model, tmp_path, capsys, compilings
):
    usual, _ = trained(tiny_model, tmp_path / "usual", capsys)
    assert not compilings
    again, said = trained(tiny_model, tmp_path / "again", capsys, compile=True, reuse_bytes=1 << 28)
    assert len(compilings) == 1
    assert "effect" not in said
    assert [line.pop("sampler/reused") for line in again] == [1.0] * 2
    for one, other in zip(usual, again, strict=True):
        assert one.keys() == other.keys()
        off = {n: (x, other[n]) for n, x in one.items() if other[n] != pytest.approx(x, rel=1e-3, abs=1e-5)}
        assert not off


def test_a_run_without_a_compiler_says_so_once_and_goes_on(tiny_model, tmp_path, capsys):
    with config.patch({"cpp.cxx": ("/nowhere/c++",), "fx_graph_cache": False}):
        lines, said = trained(tiny_model, tmp_path / "run", capsys, compile=True)
    assert said.count("rollout.compile has no effect: InductorError: InvalidCxxCompiler") == 1
    assert len(lines) == 2


@pytest.mark.parametrize("error", [AssertionError, ImportError, OSError, Exception])
def test_whatever_a_compiler_raises_steps_are_drawn_as_before(tiny_model, monkeypatch, error):
    def failing(*_):
        raise error("no such thing\nat all")

    monkeypatch.setattr(compiled, "_compiled", failing)
    heard: list[str] = []
    model = replace(opened(tiny_model), warn=heard.append)
    assert type(model.arena(2, 2, 2)) is Shared
    assert heard == [f"rollout.compile has no effect: {error.__name__}: no such thing"]


def test_a_model_without_large_matrices_is_not_compiled(tiny_model, monkeypatch):
    monkeypatch.setattr(fewrows, "LEAST", 1 << 40)
    heard: list[str] = []
    model = replace(opened(tiny_model), warn=heard.append)
    assert type(model.arena(2, 2, 2)) is Shared
    assert heard == ["rollout.compile has no effect: no matrix of the model is large enough to be packed"]


@pytest.mark.parametrize("changed", ["vocabulary", "products"])
def test_a_network_that_has_changed_its_form_is_drawn_from_as_before(tiny_model, compilings, changed):
    model = opened(tiny_model)
    sampler = Continuous(max_new_tokens=12, slots=7)
    texts(sampler, model)
    if changed == "vocabulary":
        model.network.resize_token_embeddings(model.network.config.vocab_size + 8)
    else:
        model.network.lm_head = copy.deepcopy(model.network.lm_head)
        with torch.no_grad():
            model.network.lm_head.weight *= 2
    assert texts(sampler, model) == texts(Plain(max_new_tokens=12), model)
    assert len(compilings) == 1


@pytest.mark.parametrize("wrong", ["attention", "single rows"])
def test_steps_that_give_other_numbers_are_not_used(tiny_model, monkeypatch, wrong):
    if wrong == "attention":
        monkeypatch.setattr(compiled, "attend", lambda asked, step: torch.zeros_like(asked.query))
    else:
        once = Compiled.once
        monkeypatch.setattr(
            Compiled, "once", lambda self, x: -once(self, x) if self.single and x.dim() == 2 else once(self, x)
        )
    heard: list[str] = []
    model = replace(opened(tiny_model), warn=heard.append)
    assert type(model.arena(2, 2, 2)) is Shared
    assert type(model.arena(2, 2, 2)) is Shared
    assert len(heard) == 1
    assert heard[0].startswith("rollout.compile has no effect: they differ by")


def test_where_steps_are_not_compiled_the_reason_is_said(tiny_model):
    heard: list[str] = []
    model = replace(opened(tiny_model), warn=heard.append)
    model.network.set_attn_implementation("eager")
    model.arena(2, 2, 2)
    assert heard == ["rollout.compile has no effect: it is for float32 on a CPU, with the attention `sdpa`"]
