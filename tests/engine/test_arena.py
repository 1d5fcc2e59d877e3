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
from prefopt.engine import fewrows, kernels, pages, shared
from prefopt.engine.arena import Apart, arena, disagreement
from prefopt.engine.fewrows import FewRows
from prefopt.engine.lora import Without
from prefopt.engine.models import Model, load_causal, open_model
from prefopt.engine.shared import Shared
from prefopt.engine.slots import READ_TOKENS, Layer, Slots, parts, visible
from prefopt.testing.tiny import build_tiny

CPU = torch.device("cpu")
MAKERS = (Shared, Slots)
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
    assert [disagreement(network, maker) for maker in MAKERS] == [None, None]
    opened = open_model(str(tiny_model), CPU)
    adapted = Model(network, opened.tokenizer, CPU)
    found = texts(Continuous(max_new_tokens=12, slots=5), adapted)
    assert found == texts(Plain(max_new_tokens=12), adapted)
    assert found != texts(Plain(max_new_tokens=12), opened)


def test_a_window_is_kept_in_the_probe_and_after_it(tmp_path):
    build_tiny(tmp_path / "mistral", model_type="mistral", sliding_window=6)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "mistral")
    assert [disagreement(network, maker) for maker in MAKERS] == [None, None]
    assert network.config.sliding_window == 6


def test_a_window_that_is_not_kept_is_found_though_the_probe_is_shorter(tmp_path, monkeypatch):
    build_tiny(tmp_path / "mistral", model_type="mistral", sliding_window=64)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "mistral")
    assert disagreement(network, Slots) is None
    monkeypatch.setattr("prefopt.engine.slots.visible", lambda *told: visible(*told[:2], None))
    assert "differ" in disagreement(network, Slots)


def test_a_word_that_is_ruled_out_is_no_disagreement(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    network.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([7]), -torch.inf)
    )
    assert [disagreement(network, maker) for maker in MAKERS] == [None, None]


@pytest.mark.parametrize("ruled_out", ["whole", "steps"])
def test_a_word_that_is_ruled_out_in_one_way_alone_is_one(tiny_model, ruled_out):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)

    def hook(module, inputs, logits):
        return logits.index_fill(-1, torch.tensor([7]), -torch.inf) if (logits.shape[1] > 1) == whole else logits

    whole = ruled_out == "whole"
    network.lm_head.register_forward_hook(hook)
    assert "differ" in disagreement(network, Slots)


def test_a_model_whose_slots_do_not_hold_is_drawn_row_by_row_and_says_so_once(tiny_model, monkeypatch):
    """Here one that forgets a place of every row."""
    opened, heard = open_model(str(tiny_model), CPU), []
    model = Model(opened.network, opened.tokenizer, CPU, heard.append)
    extend = Layer.extend

    def forgetful(self, rows, positions, width, keys, values):
        seen = extend(self, rows, positions, width, keys, values)
        self.keys[:, :, 0] = 0
        return seen

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
    assert isinstance(arena(Refusing(), 2, 4, 4, None, heard.append), Apart)
    assert heard[0].endswith("ValueError: no masks here")


@pytest.fixture
def pages_of_two(monkeypatch):
    for module in (fewrows, kernels, pages, shared):
        monkeypatch.setattr(module, "PAGE", 2)


def test_a_prompt_does_not_see_what_stood_in_its_place(tiny_model):
    """Not even times 0: what stood there are numbers that are none."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    slots = Shared(network, 2, 9, 4)
    slots.read([tuple(range(4, 13)), tuple(range(5, 14))], [0, 1])
    for layer in slots.layers:
        for x in layer.prompts:
            x[[*slots.pages[0]]] = torch.nan
    slots.read([(5, 6)], [0])
    logits = slots.advance(torch.tensor([7, 8]), torch.tensor([2, 9]), 10)
    with torch.no_grad():
        assert torch.allclose(logits[0], network(torch.tensor([[5, 6, 7]])).logits[0, -1], atol=1e-5)


def test_a_pass_reads_so_many_tokens_of_prompts():
    """With the longest first."""
    size = READ_TOKENS // 2
    sizes = [size, size - 1, size, size - 2, size]
    assert [[sizes[i] for i in part] for part in parts([(1,) * n for n in sizes])] == [
        [size, size],
        [size - 1, size],
        [size - 2],
    ]


@pytest.mark.parametrize("maker", MAKERS)
def test_memory_that_was_never_written_is_never_read(tiny_model, maker):
    """Not even times 0: new slots hold numbers that are none."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    slots = maker(network, 2, 66, 14)
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
    assert [disagreement(network, maker) for maker in MAKERS] == [None, None]


@pytest.mark.parametrize("maker", MAKERS)
def test_memory_is_given_back_with_the_slots(tiny_model, maker, monkeypatch):
    monkeypatch.setattr(fewrows, "LEAST", 1)
    slots = maker(AutoModelForCausalLM.from_pretrained(tiny_model), 1, 3, 5)
    slots.read([(5, 6, 7)], [0])
    for k in range(3):
        slots.advance(torch.tensor([8]), torch.tensor([3 + k]), 4 + k)
    kept = [weakref.ref(x) for x in (slots.layers[0], slots.few_rows, slots.few_rows.products[0], slots.network)]
    gc.disable()
    try:
        del slots
        assert [x() for x in kept] == [None] * 4
    finally:
        gc.enable()


def test_adapters_are_off_while_prompts_are_read_and_rows_advanced(tiny_model, monkeypatch):
    """The first drawing is of an adapter that changes nothing, the second of one that does."""
    monkeypatch.setattr(fewrows, "LEAST", 1)
    network = load_causal(ModelConfig(path=str(tiny_model), lora=LoraConfig(rank=2)))
    opened = open_model(str(tiny_model), CPU)
    base, sampler = Model(Without(network), opened.tokenizer, CPU), Continuous(max_new_tokens=8, slots=5)
    expected = texts(sampler, opened)
    assert texts(sampler, base) == expected
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    assert texts(sampler, base) == expected
    assert texts(sampler, Model(network, opened.tokenizer, CPU)) != expected
    slots = base.arena(2, 3, 3)
    assert type(slots) is Shared
    assert {*slots.few_rows.layers} == {m for m in network.modules() if type(m) is torch.nn.Linear}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral"])
@pytest.mark.usefixtures("pages_of_two")
def test_every_shortcut_draws_the_text_of_the_plain_sampler(tmp_path, family, monkeypatch):
    """Every matrix packed and every prompt in one place, while rows end and others begin. A page with more rows than
    the mean is read again for the rest."""
    monkeypatch.setattr(fewrows, "LEAST", 1)
    monkeypatch.setattr(pages, "SKEW", 1)
    used = []
    monkeypatch.setattr(FewRows, "of", lambda self, step, of=FewRows.of: (used.append((self, step)), of(self, step))[1])
    build_tiny(tmp_path / family, model_type=family)
    model = open_model(str(tmp_path / family), CPU)
    requests = [Request(PROMPTS[i // 4 % 4], 100 + i) for i in range(24)]
    found, expected = (
        [c.ids for _, c in sorted(sampler.open(model)(requests), key=lambda pair: pair[0])]
        for sampler in (Continuous(max_new_tokens=12, slots=7), Plain(max_new_tokens=12))
    )
    assert found == expected
    assert len({len(ids) for ids in found}) > 1
    assert max(step.sharing.rows.count(pages) for _, step in used for pages in step.sharing.rows if len(pages) > 1) >= 4
    assert {orders.pages is None for _, step in used for orders in step.sharing.known.values()} == {True, False}
    assert all(mode.products for mode, _ in used)
    assert all(product.packed is not None for mode, _ in used for product in mode.products)


def test_a_model_for_which_the_shortcuts_do_not_hold_is_drawn_in_slots_without_them(tiny_model, monkeypatch):
    opened, heard = open_model(str(tiny_model), CPU), []
    model = Model(opened.network, opened.tokenizer, CPU, heard.append)
    monkeypatch.setattr(fewrows, "attention", lambda asked, step: torch.zeros_like(asked.query))
    assert texts(Continuous(max_new_tokens=8), model) == texts(Plain(max_new_tokens=8), model)
    assert len(heard) == 1
    assert heard[0].startswith("rows are drawn in a slower way: the fastest does not hold for this model: they")
    assert type(model.arena(2, 2, 2)) is Slots


def test_a_model_whose_matrices_cannot_be_packed_is_drawn_in_slots(tiny_model, monkeypatch):
    network, heard = AutoModelForCausalLM.from_pretrained(tiny_model), []
    monkeypatch.setattr(fewrows, "LEAST", 1)
    product = fewrows._product
    monkeypatch.setattr(fewrows, "_product", lambda *told: 2 * product(*told))
    made = arena(network, 2, 2, 2, None, heard.append)
    assert type(made) is Slots
    assert made.few_rows is None
    assert len(heard) == 1


def test_a_network_that_was_probed_elsewhere_is_probed_again(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert type(arena(network, 2, 2, 2, None, print)) is Shared
    network.set_attn_implementation("eager")
    assert type(arena(network, 2, 2, 2, None, print)) is Slots
    assert arena(network.to(torch.bfloat16), 2, 2, 2, None, print).few_rows is None


def test_slots_take_no_more_than_the_whole_of_a_row(tiny_model):
    slots = Slots(AutoModelForCausalLM.from_pretrained(tiny_model), 2, 6, 6, 8)
    slots.read([(5, 6, 7)], [0])
    assert slots.layers[0].keys.shape[2] == 8


def test_a_model_with_attention_of_its_own_is_drawn_in_slots(tiny_model):
    network, heard = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager"), []
    made = arena(network, 2, 2, 2, None, heard.append)
    assert type(made) is Slots
    assert made.few_rows is not None
    assert heard == []


@pytest.mark.usefixtures("pages_of_two")
def test_pages_that_move_and_become_more_are_found_again(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    slots = Shared(network, 3, 9, 6)
    rows = [[9, 8, 7, 6, 5], [*range(5, 14)], [6, 7, 8]]
    slots.read([tuple(rows[i]) for i in (1, 2, 0)], [1, 2, 0])

    def step(n: int) -> None:
        for row in rows[:n]:
            row.append(4 + len(row))
        tokens, positions = ([f(row) for row in rows[:n]] for f in (lambda row: row[-1], lambda row: len(row) - 1))
        found = slots.advance(torch.tensor(tokens), torch.tensor(positions), max(positions) + 1)
        with torch.no_grad():
            whole = torch.stack([network(torch.tensor([row])).logits[0, -1] for row in rows[:n]])
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)

    assert slots.pages == [(7, 8, 9), (0, 1, 2, 3, 4), (5, 6)]
    step(1)
    assert slots.pages == [(0, 1, 2), (7, 8, 9, 3, 4), (5, 6)]
    step(3)
    rows[2] = [4, 5, 6, 7, 8, 9, 10]
    slots.read([tuple(rows[2])], [2])
    assert slots.pages == [(0, 1, 2), (7, 8, 9, 3, 4), (5, 6, 10, 11)]
    step(3)
    sharing = slots.sharing
    step(3)
    assert slots.sharing is sharing
    step(1)
    assert slots.sharing is not sharing
    step(3)


@pytest.mark.usefixtures("pages_of_two")
def test_a_prompt_of_what_is_no_number_spoils_its_own_rows_alone(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    slots = Shared(network, 4, 9, 4)
    slots.read([(5,), (6,), (7, 8, 9, 10, 11), ()], [0, 1, 2, 3])
    for layer in slots.layers:
        for x in layer.prompts:
            x[slots.pages[0][0]] = torch.nan
    found = slots.advance(torch.tensor([4, 5, 6, 7]), torch.tensor([1, 1, 5, 0]), 6)
    assert found[0].isnan().all()
    for logits, row in zip(found[1:], ([6, 5], [7, 8, 9, 10, 11, 6], [7]), strict=True):
        with torch.no_grad():
            assert torch.allclose(logits, network(torch.tensor([row])).logits[0, -1], atol=1e-5)


@pytest.mark.usefixtures("pages_of_two")
def test_a_prompt_stands_in_one_place_as_long_as_a_row_begins_with_it(tiny_model):
    """Slots 0 .. 2 hold one prompt, 3 its first two tokens, 4 another that is the same by chance, 5 none."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    slots = Shared(network, 6, 5, 6)
    slots.read([(5, 6, 7), (5, 6, 7), ()], [0, 4, 5])
    slots.copy(0, [1, 2], 3)
    slots.copy(1, [3], 2)
    assert slots.pages == [(0, 1), (0, 1), (0, 1), (0,), (2, 3), ()]
    rows = [[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6], [5, 6, 7], []]

    def step(*tokens: int) -> None:
        for row, token in zip(rows, tokens, strict=False):
            row.append(token)
        positions = [len(row) - 1 for row in rows[: len(tokens)]]
        found = slots.advance(torch.tensor(tokens), torch.tensor(positions), max(positions) + 1)
        for logits, row in zip(found, rows, strict=False):
            with torch.no_grad():
                whole = network(torch.tensor([row])).logits[0, -1]
            torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)

    step(8, 9, 10, 11, 12, 13)
    step(9, 9, 9, 9, 9, 9)
    rows[1] = [5, 6]  # a row that goes back beyond what was drawn for it
    step(10, 11, 10, 10)
    slots.copy(2, [0], 5)  # one that goes on is moved, with two tokens of its own
    rows[0] = rows[2][:5]
    step(12, 12, 12)
    slots.read([(9, 8, 7, 6, 5), (4,)], [0, 2])
    rows[0], rows[2] = [9, 8, 7, 6, 5], [4]
    assert slots.pages == [(1, 4, 5), (0,), (6,), (0,), (2, 3), ()]
    step(5, 5, 5, 5, 5, 5)
    slots.copy(2, [1], 2)
    rows[1] = rows[2][:2]
    step(6, 6)
    assert slots.pages[:2] == [(1, 4, 5), (6,)]  # four pages are more than half of the first seven
    slots.copy(2, [0], 2)
    rows[0] = rows[2][:2]
    step(7, 8)
    assert slots.pages == [(0,), (0,), (0,), (6,), (2, 3), ()]  # one is less: it has moved to the first
    rows[2] = rows[2][:2]
    step(8, 7, 5, 9, 9)


@pytest.mark.parametrize("maker", MAKERS)
def test_prompts_of_very_different_length_are_read_apart(tiny_model, monkeypatch, maker):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    seen = []
    monkeypatch.setattr(Slots, "_pass", lambda self, name, where, *_: seen.append(where.tolist()))
    monkeypatch.setattr(network.base_model, "forward", lambda **_: None)
    lengths = [8, 31, 40, 6, 30, 9]
    maker(network, 6, 48, 16).read([tuple(range(5, 5 + n)) for n in lengths], [*range(6)])
    where = {Slots: [[1, 2, 4], [0, 5], [3]], Shared: [[1, 2, 3, 5], [0, 6], [4]]}  # 40 tokens have two pages
    assert [sorted(part) for part in seen] == where[maker]
