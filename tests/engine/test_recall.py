"""What drawing computed: what of it is looked up, when it is not, and that nothing depends on it but rounding."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from prefopt.api import Request
from prefopt.builtin.continuous import Continuous
from prefopt.data.render import Tokens
from prefopt.engine import fewrows
from prefopt.engine.forward import Scorer
from prefopt.engine.layout import Packed, Paths
from prefopt.engine.models import Model, open_model
from prefopt.engine.recall import Recall, recalled
from prefopt.engine.remembering import Remembering
from prefopt.testing.tiny import train_on

CPU = torch.device("cpu")
SHARED = Paths("shared", tiled=True)
PROMPTS = [(5, 6, 7), (5, 6, 7), (8,), (9, 10, 11, 12)]


@pytest.fixture(autouse=True)
def matrices_of_any_size_are_packed(monkeypatch):
    monkeypatch.setattr(fewrows, "LEAST", 1)


class Drawn:
    """A model, what it drew, and what is known of that."""

    def __init__(self, folder, budget: int = 1 << 30, warn=pytest.fail) -> None:
        opened = open_model(str(folder), CPU)
        self.recall = Recall(budget, warn)
        self.model = Model(opened.network, opened.tokenizer, CPU, warn, self.recall)
        self.scorer = Scorer(self.model.network, paths=SHARED)
        self.scorer.recall = self.recall

    def draw(self) -> list[Tokens]:
        requests = [Request(prompt, i) for i, prompt in enumerate(PROMPTS)]
        found = dict(Continuous(max_new_tokens=6, slots=3).open(self.model)(requests))
        return [Tokens(prompt, found[i].ids) for i, prompt in enumerate(PROMPTS)]

    def knows(self, *tokens: Tokens) -> bool:
        return self.recall.of(Packed.of(tokens, range(len(tokens)), SHARED)) is not None


@pytest.fixture
def drawn(tiny_model) -> Drawn:
    return Drawn(tiny_model)


def test_a_sequence_is_known_up_to_its_last_token(drawn):
    sequence = drawn.draw()[3]
    body = sequence.completion[:-1]
    assert drawn.knows(sequence)
    assert drawn.knows(Tokens(sequence.prompt, (*body, 33)))  # nothing follows it, and nothing was computed of it
    assert not drawn.knows(Tokens(sequence.prompt, (*sequence.completion, 33)))
    assert not drawn.knows(Tokens(sequence.prompt, (33, *body)))
    assert not drawn.knows(sequence, Tokens((20, 21), (22, 23)))


def test_products_are_those_that_were_computed(drawn, monkeypatch):
    """Of each token of each sequence, whichever slot it stood in: recorded by a pass over each sequence alone."""
    tokens = drawn.draw()
    packed = Packed.of(tokens, [0, 0, 1, 2], SHARED)
    layer = drawn.model.network.model.layers[0].mlp.down_proj
    inputs: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0][0]))
    for t in tokens:
        drawn.model.network(torch.tensor([[*t.prompt, *t.completion]]))
    with recalled(drawn.recall, packed) as known:
        found = linear(torch.zeros(*packed.ids.shape, layer.in_features), layer.weight).flatten(0, 1)
    assert known is not None
    for places, given in zip(packed.sequences, inputs, strict=True):
        expected = (given.double() @ layer.weight.double().T)[:-1]
        torch.testing.assert_close(found[places[:-1]].double(), expected, atol=1e-5, rtol=0)


def test_a_product_that_is_looked_up_is_derived_from_as_a_product(drawn):
    packed = Packed.of(drawn.draw(), range(4), SHARED)
    weight = drawn.model.network.model.layers[1].mlp.up_proj.weight
    given = torch.randn(*packed.ids.shape, weight.shape[1], requires_grad=True)
    slope = torch.randn(*packed.ids.shape, len(weight))
    expected = torch.autograd.grad(linear(given, weight), (given, weight), slope)
    with recalled(drawn.recall, packed):
        output = linear(given, weight)
    assert not torch.allclose(output, linear(given, weight))
    for a, b in zip(torch.autograd.grad(output, (given, weight), slope), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_known_once_a_weight_has_changed(drawn):
    tokens = drawn.draw()
    assert drawn.knows(*tokens)
    with torch.no_grad():
        drawn.model.network.lm_head.weight.mul_(1.0)
    assert not drawn.knows(*tokens)


def test_what_does_not_fit_is_not_kept_and_said_once(tiny_model):
    heard: list[str] = []
    drawn = Drawn(tiny_model, 20_000, heard.append)
    for _ in range(2):
        drawn.recall.clear()
        tokens = drawn.draw()
        assert not drawn.knows(*tokens)
        assert not drawn.recall.kept
    assert heard == ["nothing of the draws is reused: a step takes more than rollout.reuse_bytes, 20,000"]


def test_a_layer_that_is_used_twice_in_a_pass_is_computed(drawn):
    """So is one that a pass gives other tokens."""
    twice = nn.Linear(3, 2, bias=False)
    with drawn.recall.hearing(4):
        for _ in range(2):
            drawn.recall.heard(twice.weight, torch.zeros(4, 2))
        other = nn.Linear(3, 2, bias=False)
        drawn.recall.heard(other.weight, torch.zeros(3, 2))
    assert drawn.recall.kept[id(twice.weight)].unfit
    assert id(other.weight) not in drawn.recall.kept


def test_an_arena_of_one_cache_for_each_row_is_not_heard(tiny_model, monkeypatch):
    monkeypatch.setattr(fewrows, "_known", False)
    drawn = Drawn(tiny_model, warn=lambda message: None)
    assert not isinstance(drawn.model.arena(2, 4, 4), Remembering)
    assert not drawn.knows(*drawn.draw())


SECTIONS = {
    "algorithm": {"name": "rloo", "n": 4, "beta": 0.05},
    "reward": {"name": "length", "unit": "characters", "maximum": 3, "margin": 3},
    "sampler": {"name": "continuous", "max_new_tokens": 6},
    "reference": {"mode": "resident"},
}


def trained(tiny_model, folder, capsys, **sections) -> tuple[list[dict], str]:
    capsys.readouterr()
    result = train_on(tiny_model, folder, {**SECTIONS, **sections})
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return lines, capsys.readouterr().out


def test_a_run_is_the_same_up_to_rounding(tiny_model, tmp_path, capsys):
    usual, _ = trained(tiny_model, tmp_path / "usual", capsys)
    again, said = trained(tiny_model, tmp_path / "again", capsys, rollout={"reuse_bytes": 1 << 28})
    assert "reuse" not in said
    assert [line.pop("sampler/reused") for line in again] == [1.0] * 4
    for one, other in zip(usual, again, strict=True):
        assert one.keys() == other.keys()
        assert all(other[name] == pytest.approx(x, rel=1e-3, abs=1e-5) for name, x in one.items())


def test_later_updates_of_a_step_compute_everything(tiny_model, tmp_path, capsys):
    """At a small rate: the first update of AdamW makes whole ones of gradients that are nothing but rounding."""
    algorithm = {**SECTIONS["algorithm"], "inner_epochs": 2, "minibatches": 2}
    sections = {"algorithm": algorithm, "optim": {"batch_size": 8, "lr": 1e-5}}
    usual, _ = trained(tiny_model, tmp_path / "usual", capsys, **sections)
    again, _ = trained(tiny_model, tmp_path / "again", capsys, **sections, rollout={"reuse_bytes": 1 << 28})
    for one, other in zip(usual, again, strict=True):
        assert other["gradient/norm"] == pytest.approx(one["gradient/norm"], rel=1e-3)
        assert 0 < other["sampler/reused"] <= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optim": {"batch_size": 8, "forward": "plain"}}, "optim.forward is plain"),
        ({"optim": {"batch_size": 8, "precision": "bfloat16"}}, "it is for float32 on a CPU"),
        ({"optim": {"batch_size": 8, "gradient_checkpointing": True}}, "computes everything again"),
        ({"model": {"lora": {"rank": 2}}}, "the model has adapters"),
    ],
)
def test_where_it_does_not_hold_the_run_says_why_and_goes_on(tiny_model, tmp_path, capsys, change, reason):
    sections = {name: {**section} for name, section in change.items()}
    if "model" in sections:
        sections["model"]["path"] = str(tiny_model)
    lines, said = trained(tiny_model, tmp_path / "run", capsys, rollout={"reuse_bytes": 1 << 28}, **sections)
    assert "rollout.reuse_bytes has no effect" in said
    assert reason in said
    assert "sampler/reused" not in lines[0]


def test_a_model_whose_numbers_would_be_others_is_left_alone(tiny_model, tmp_path, capsys, monkeypatch):
    """Here what is kept is not what was computed."""
    heard = Recall.heard
    monkeypatch.setattr(Recall, "heard", lambda self, matrix, product: heard(self, matrix, 1.01 * product))
    _, said = trained(tiny_model, tmp_path / "run", capsys, rollout={"reuse_bytes": 1 << 28})
    assert "rollout.reuse_bytes has no effect: numbers differ by" in said
