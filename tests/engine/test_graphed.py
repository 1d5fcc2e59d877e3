"""Recorded steps. On a CPU a tape stands for a CUDA graph: operations are recorded with the tensors they were given and
played again on them, without Python; what a graph cannot hold ends the test."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import AutoModelForCausalLM

from prefopt.api import Request
from prefopt.builtin.continuous import Continuous, _Drawing
from prefopt.builtin.samplers import Plain
from prefopt.engine import arena as arenas
from prefopt.engine.arena import arena, disagreement
from prefopt.engine.graphed import Graphed, cuda_graphs, tried_graphs
from prefopt.engine.models import open_model
from prefopt.engine.probe import WINDOW
from prefopt.engine.slots import Slots

CPU = torch.device("cpu")
REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "is_nonzero", "bincount"}
REFUSED |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
CALLS = {"tolist", "numpy", "cpu", "item", "__array__", "__bool__", "__int__", "__float__", "__index__"}
"""Operations and methods for which the host waits for the device, or gives it numbers of its own."""
MESSAGE = "operation not permitted when stream is capturing"
REQUESTS = [Request(tuple(range(5, 5 + (1, 3, 60, 7, 1)[i % 5])), 100 + i) for i in range(14)]


class Tape(TorchDispatchMode):
    """Records what is computed within it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        masked = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in REFUSED or masked:
            raise RuntimeError(f"{MESSAGE}: {name}")
        found = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, found))
        return found

    def play(self):
        known = {}

        def now(x):
            return known.get(id(x), x)

        for func, args, kwargs, before in self.steps:
            again = func(*tree_map_only(torch.Tensor, now, args), **tree_map_only(torch.Tensor, now, kwargs))
            known |= {id(a): b for a, b in zip(tree_flatten(before)[0], tree_flatten(again)[0], strict=True)}


class Alone(TorchFunctionMode):
    """The host neither waits nor looks within it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in CALLS:
            raise RuntimeError(f"{MESSAGE}: {func.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def recording():
    with Tape() as tape, Alone():
        yield tape


@pytest.fixture
def tapes():
    """Where every recording is kept, with how often each was played."""
    return []


@pytest.fixture
def recorder(tapes):
    def record(run):
        with recording() as tape:
            run()
        tapes.append([tape, 0])
        entry = tapes[-1]

        def play():
            entry[1] += 1
            tape.play()

        return play

    return lambda device: record


@pytest.fixture
def graphed(recorder):
    return partial(Graphed, recorder=recorder)


def test_recorded_steps_give_what_each_row_gives_that_is_read_whole(architecture, graphed, tapes):
    network = AutoModelForCausalLM.from_pretrained(architecture)
    assert disagreement(network, graphed) is None
    assert [played for _, played in tapes] == [2 * WINDOW - 1]


def test_text_is_that_of_the_plain_sampler(tiny_model, graphed, tapes, monkeypatch):
    """With refill, prompts of one token, rows that end, and steps of more than one size."""
    monkeypatch.setattr(arenas, "_makers", lambda network: iter([graphed]))
    model = open_model(str(tiny_model), CPU)
    found, expected = both_texts(model)
    assert found == expected
    assert len(tapes) > 4
    assert sum(played for _, played in tapes) > 10 * len(tapes)


def both_texts(model):
    samplers = Continuous(max_new_tokens=90, slots=5), Plain(max_new_tokens=90)
    return [sorted((i, c.ids) for i, c in s.open(model)(REQUESTS)) for s in samplers]


def test_rows_that_were_not_asked_for_leave_every_place_as_it_was(tiny_model, graphed):
    """Three rows are computed as four; the fourth slot holds a prompt."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    slots = graphed(network, 6, 4, 8)
    slots.read([(5, 6), (7,), (8, 9), (10, 11, 12), (13,), (14,)], list(range(6)))
    before = [layer.keys[3:, :, : slots.seen].clone() for layer in slots.layers]
    for k in range(4):
        slots.advance(torch.tensor([20, 21, 22]), torch.tensor([2, 1, 2]) + k, 3 + k)
    after = [layer.keys[3:, :, : slots.seen] for layer in slots.layers]
    assert all(map(torch.equal, before, after))


def test_steps_are_recorded_for_numbers_rounded_up_to_what_there_is(tiny_model, graphed):
    slots = graphed(AutoModelForCausalLM.from_pretrained(tiny_model), 40, 100, 100, 150)
    for rows, width in ((3, 5), (4, 128), (17, 129), (40, 150)):
        slots.advance(torch.full((rows,), 7), torch.full((rows,), width - 1), width)
    assert slots.seen == 192
    assert [*slots.steps] == [(4, 128), (32, 192), (40, 192)]


def test_logits_stay_when_another_step_is_played(tiny_model, graphed):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    slots, plain = graphed(network, 1, 2, 8), Slots(network, 1, 2, 8)
    for x in (slots, plain):
        x.read([(5, 6)], [0])
    found, expected = (
        [x.advance(torch.tensor([7 + k]), torch.tensor([2 + k]), 3 + k) for k in range(4)] for x in (slots, plain)
    )
    torch.testing.assert_close(found, expected)


def test_memory_is_given_back_with_the_slots(tiny_model, graphed, tapes):
    slots = graphed(AutoModelForCausalLM.from_pretrained(tiny_model), 1, 3, 5)
    slots.read([(5, 6, 7)], [0])
    for k in range(3):
        slots.advance(torch.tensor([8]), torch.tensor([3 + k]), 4 + k)
    kept = [weakref.ref(x) for x in (slots, slots.layers[0], slots.network)]
    gc.disable()
    try:
        tapes.clear()
        del slots
        assert [x() for x in kept] == [None] * 3
    finally:
        gc.enable()


def test_a_model_that_asks_the_host_is_drawn_without(tiny_model, graphed, monkeypatch):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    network.lm_head.register_forward_hook(lambda module, inputs, logits: logits * float(logits.isfinite().all()))
    heard: list[str] = []
    monkeypatch.setattr(Graphed, "serves", staticmethod(lambda network: True))
    monkeypatch.setitem(arenas.TRIED, Graphed, graphed)
    assert not isinstance(arena(network, 2, 4, 4, None, heard.append), Graphed)
    reason = f"RuntimeError: {MESSAGE}: __float__"
    assert heard == [f"rows are drawn in a slower way: the fastest does not hold for this model: {reason}"]


def test_a_model_is_probed_again_on_another_device(tiny_model, monkeypatch):
    network, asked = AutoModelForCausalLM.from_pretrained(tiny_model), []
    monkeypatch.setattr(arenas, "_probed", lambda network, *_: asked.append(network.device.type) or Slots)
    for _ in range(2):
        arena(network, 1, 1, 1, None, print)
    network.to("meta")
    arena(network, 1, 1, 1, None, print)
    assert asked == ["cpu", "meta"]


@pytest.mark.parametrize(
    "setting",
    [{}, {"greedy": True}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "min_new_tokens": 2}],
    ids=["plain", "greedy", "filters"],
)
def test_the_host_waits_for_no_token(tiny_model, setting, graphed, monkeypatch):
    """Between two looks at the rows, steps give the device everything and ask it nothing."""
    monkeypatch.setattr(arenas, "_makers", lambda network: iter([graphed]))
    model = open_model(str(tiny_model), CPU)
    drawing = _Drawing(
        Continuous(max_new_tokens=40, **setting), [model], 0.0, [Request((5, 6, 7), k) for k in range(3)]
    )
    drawing._admit()
    for k in range(2):
        drawing._step(3, 4 + k)
    monkeypatch.setattr(drawing.arenas[0], "_step", lambda rows, width: None)
    with recording():
        for k in range(2, 10):
            drawing._step(3, 4 + k)
    assert int(drawing.rows.count[:3].max()) == 10


@pytest.mark.gpu
def test_graphs_of_a_gpu_hold(architecture):
    network = AutoModelForCausalLM.from_pretrained(architecture).cuda()
    assert disagreement(network, arenas.TRIED[Graphed]) is None


@pytest.mark.gpu
def test_text_drawn_with_graphs_is_that_of_the_plain_sampler(tiny_model):
    model = open_model(str(tiny_model), torch.device("cuda"))
    assert isinstance(model.arena(2, 2, 2), Graphed)
    found, expected = both_texts(model)
    assert found == expected


@pytest.mark.gpu
def test_a_gpu_goes_on_after_what_cannot_be_recorded():
    device, stream = torch.device("cuda"), torch.cuda.current_stream()
    x = torch.ones(1, device=device)
    with pytest.raises(RuntimeError):
        tried_graphs(device)(x.item)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(1, device=device).item() < 1
    play = cuda_graphs(device)(lambda: x.add_(1))
    assert x.item() == 1
    play()
    assert x.item() == 2
    assert torch.cuda.current_stream() == stream
