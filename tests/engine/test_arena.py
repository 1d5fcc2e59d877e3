"""Slots of keys and values against rows read whole, on every family, and rows one by one where slots do not hold."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.api import Request
from prefopt.builtin.continuous import Continuous
from prefopt.builtin.samplers import Plain
from prefopt.config import LoraConfig, ModelConfig
from prefopt.engine import arena as arenas
from prefopt.engine import fewrows
from prefopt.engine.arena import Apart, Layer, Slots, arena, disagreement
from prefopt.engine.fewrows import Block, FewRows
from prefopt.engine.models import Model, load_causal, open_model
from prefopt.testing.tiny import build_tiny

CPU = torch.device("cpu")
PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13), (5, 6)]
REQUESTS = [Request(PROMPTS[i % 4], 100 + i) for i in range(12)]


def texts(sampler, model: Model) -> list[tuple[int, ...]]:
    return [c.ids for _, c in sorted(sampler.open(model)(REQUESTS), key=lambda pair: pair[0])]


def with_adapters(folder) -> torch.nn.Module:
    """Adapters that change the model."""
    network = load_causal(ModelConfig(path=str(folder), lora=LoraConfig(rank=2)))
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return network


def test_rows_with_adapters_are_drawn_in_slots(tiny_model):
    network = with_adapters(tiny_model)
    assert disagreement(network) is None
    opened = open_model(str(tiny_model), CPU)
    adapted = Model(network, opened.tokenizer, CPU)
    found = texts(Continuous(max_new_tokens=12, slots=5), adapted)
    assert found == texts(Plain(max_new_tokens=12), adapted)
    assert found != texts(Plain(max_new_tokens=12), opened)


def test_a_window_is_kept_in_the_probe_and_after_it(tmp_path):
    build_tiny(tmp_path / "mistral", model_type="mistral", sliding_window=6)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "mistral")
    assert disagreement(network) is None
    assert network.config.sliding_window == 6


def test_a_word_that_is_ruled_out_is_no_disagreement(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    network.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([7]), -torch.inf)
    )
    assert disagreement(network) is None


def test_a_model_whose_slots_do_not_hold_is_drawn_row_by_row_and_says_so_once(tiny_model, monkeypatch):
    """Here one that forgets a place of every row."""
    opened, heard = open_model(str(tiny_model), CPU), []
    model = Model(opened.network, opened.tokenizer, CPU, heard.append)
    extend = Layer.extend

    def forgetful(self, rows, positions, width, keys, values):
        extend(self, rows, positions, width, keys, values)
        self.keys[:, :, 0] = 0
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]

    monkeypatch.setattr(Layer, "extend", forgetful)
    found = [texts(Continuous(max_new_tokens=8, slots=slots), model) for slots in (3, 12)]
    assert found == [texts(Plain(max_new_tokens=8), model)] * 2
    assert len(heard) == 1
    assert heard[0].startswith(
        "rows are drawn one by one: keys and values of many do not hold for this model: they differ"
    )
    assert isinstance(model.arena(2, 2, 2), Apart)


def test_a_model_that_refuses_is_drawn_row_by_row(tiny_model):
    class Refusing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = AutoModelForCausalLM.from_pretrained(tiny_model)
            self.config, self.base_model = self.inner.config, self.inner.base_model

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, attention_mask=None, **inputs):
            if attention_mask is not None:
                raise ValueError("no masks here\nat all")
            return self.inner(**inputs)

    heard: list[str] = []
    assert isinstance(arena(Refusing(), 2, 4, 4, heard.append), Apart)
    assert heard[0].endswith("ValueError: no masks here")


def test_memory_that_was_never_written_is_never_read(tiny_model):
    """Not even times 0: new slots hold numbers that are none."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    slots = Slots(network, 2, 66, 14)
    slots.read([(5, 6, 7)], [0])
    for layer in slots.layers:
        layer.keys[:, :, layer.ready :] = torch.nan
        layer.values[:, :, layer.ready :] = torch.nan
    slots.read([tuple(range(5, 70))], [1])
    logits = slots.advance(torch.tensor([8, 9]), torch.tensor([3, 65]), 70)
    assert bool(logits.isfinite().all())
    with torch.no_grad():
        assert torch.allclose(logits[0], network(torch.tensor([[5, 6, 7, 8]])).logits[0, -1], atol=1e-5)


def test_a_model_of_five_words_can_be_probed(tmp_path):
    build_tiny(tmp_path / "five", vocab_size=5)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "five")
    network.resize_token_embeddings(5)
    assert disagreement(network) is None


def test_rows_of_one_prompt_read_it_from_the_first(tiny_model):
    """What the others hold of it is no number here."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    slots = Slots(network, 3, 3, 5)
    slots.worth = 1
    slots.read([(5, 6, 7)], [0])
    slots.copy(0, [1, 2], 3)
    for layer in slots.layers:
        layer.keys[1:, :, :3] = layer.values[1:, :, :3] = torch.nan
    found = slots.advance(torch.tensor([8, 9, 10]), torch.tensor([3, 3, 3]), 4)
    with torch.no_grad():
        whole = network(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 10]])).logits[:, -1]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_memory_is_given_back_with_the_slots(tiny_model):
    slots = Slots(AutoModelForCausalLM.from_pretrained(tiny_model), 1, 3, 5)
    slots.read([(5, 6, 7)], [0])
    slots.advance(torch.tensor([8]), torch.tensor([3]), 4)
    kept = weakref.ref(slots.layers[0])
    gc.disable()
    try:
        del slots
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral"])
def test_every_shortcut_draws_the_text_of_the_plain_sampler(tmp_path, family, monkeypatch):
    """Every matrix packed and every shared prompt read once, while rows end and others begin."""
    monkeypatch.setattr(arenas, "SHARED_TOKENS", 1)
    monkeypatch.setattr(fewrows, "LEAST", 1)
    used = []
    monkeypatch.setattr(
        FewRows, "of", lambda self, step, of=FewRows.of: (used.append((self, step.blocks)), of(self, step))[1]
    )
    build_tiny(tmp_path / family, model_type=family)
    model = open_model(str(tmp_path / family), CPU)
    requests = [Request(PROMPTS[i // 4 % 4], 100 + i) for i in range(24)]
    found, expected = (
        [c.ids for _, c in sorted(sampler.open(model)(requests), key=lambda pair: pair[0])]
        for sampler in (Continuous(max_new_tokens=12, slots=7), Plain(max_new_tokens=12))
    )
    assert found == expected
    assert len({len(ids) for ids in found}) > 1
    assert any(block.together for _, blocks in used for block in blocks)
    assert all(product.packed is not None for mode, _ in used for product in mode.products)


def test_a_model_for_which_the_shortcuts_do_not_hold_is_drawn_in_slots_without_them(tiny_model, monkeypatch):
    opened, heard = open_model(str(tiny_model), CPU), []
    model = Model(opened.network, opened.tokenizer, CPU, heard.append)
    monkeypatch.setattr(fewrows, "_attention", lambda asked, step: torch.zeros_like(asked.query))
    assert texts(Continuous(max_new_tokens=8), model) == texts(Plain(max_new_tokens=8), model)
    assert len(heard) == 1
    assert heard[0].startswith(
        "rows are drawn without the shortcuts for few rows, which do not hold for this model: they"
    )
    slots = model.arena(2, 2, 2)
    assert isinstance(slots, Slots)
    assert slots.few_rows is None


def test_rows_of_one_prompt_are_known_until_one_is_given_other_tokens(tiny_model):
    """Slots 0 .. 2 hold one prompt, 3 its first two tokens, 4 another that is the same by chance. Own tokens stand
    from column 5 on."""
    slots = Slots(AutoModelForCausalLM.from_pretrained(tiny_model), 6, 5, 11)

    def blocks(*positions):
        return slots._blocks([*positions], [slots._column(*pair) for pair in enumerate(positions)])

    slots.worth = 1
    slots.read([(5, 6, 7), (5, 6, 7)], [0, 4])
    slots.copy(0, [1, 2], 3)
    assert blocks(3, 4, 8) == [Block(0, 3, 5, 11), Block(0, 3, 0, 3, True)]
    slots.copy(1, [3], 2)
    assert blocks(3, 4, 8, 5, 3) == [Block(0, 4, 2, 11), Block(4, 5, 0, 6), Block(0, 4, 0, 2, True)]
    assert blocks(3, 3, 9) == [Block(0, 3, 5, 12), Block(0, 3, 0, 3, True)]
    assert blocks(3, 1, 9) == [Block(0, 3, 1, 12), Block(0, 3, 0, 1, True)]  # row 1 is written over from there on
    assert blocks(3, 4, 10) == [Block(0, 3, 1, 13), Block(0, 3, 0, 1, True)]
    slots.copy(2, [1], 9)  # a row that goes on is moved, with its own tokens
    assert blocks(3, 9, 10) == [Block(0, 3, 5, 13), Block(0, 3, 0, 3, True)]
    slots.worth = 7
    assert blocks(3, 9, 10) == [Block(0, 3, 0, 13)]
    slots.worth = 1
    slots.read([(5, 6, 7)], [1])
    assert blocks(3, 9, 10) == [Block(0, 3, 0, 13)]
    slots.read([(5, 6), (7, 8, 9, 10)], [0, 2])
    slots.copy(0, [1], 2)
    slots.copy(2, [3], 4)
    expected = [Block(0, 4, 5, 7), Block(0, 2, 0, 2, True), Block(2, 4, 0, 4, True)]
    assert blocks(2, 3, 4, 4) == expected  # the own tokens of both prompts' rows stand in the same columns


def test_prompts_of_very_different_length_are_read_apart(tiny_model, monkeypatch):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    seen = []
    monkeypatch.setattr(Slots, "_pass", lambda self, name, slots: seen.append(slots.tolist()))
    monkeypatch.setattr(network.base_model, "forward", lambda **_: None)
    lengths = [8, 31, 40, 6, 30, 9]
    Slots(network, 6, 48, 16).read([tuple(range(5, 5 + n)) for n in lengths], [*range(6)])
    assert [sorted(part) for part in seen] == [[1, 2, 4], [0, 5], [3]]
