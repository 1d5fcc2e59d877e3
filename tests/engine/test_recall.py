"""What drawing computed: what of it is looked up, when it is not, and that nothing depends on it but rounding."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from prefopt.api import Request, RolloutAlgorithm
from prefopt.builtin.continuous import Continuous
from prefopt.data.render import Tokens
from prefopt.engine import fewrows
from prefopt.engine.fewrows import marks
from prefopt.engine.forward import Scorer
from prefopt.engine.layout import Packed, Paths
from prefopt.engine.models import Model, open_model
from prefopt.engine.recall import ROOT, Known, Recall, recalled
from prefopt.engine.remembering import Remembering
from prefopt.session import Session
from prefopt.testing.tiny import build_tiny, train_on

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

    def draw(self, **options: int) -> list[Tokens]:
        requests = [Request(prompt, i) for i, prompt in enumerate(PROMPTS)]
        found = dict(Continuous(max_new_tokens=6, slots=3, **options).open(self.model)(requests))
        return [Tokens(prompt, found[i].ids) for i, prompt in enumerate(PROMPTS)]

    @torch.no_grad()
    def states(self, packed: Packed) -> torch.Tensor:
        """Those that predict a token."""
        self.scorer.recall = None
        return self.scorer._states(packed, packed.source)

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
    given = torch.zeros(packed.ids.numel(), layer.in_features)
    for places, x in zip(packed.sequences, inputs, strict=True):
        given[places] = x.detach()
    with recalled(drawn.recall, packed) as known:
        found = linear(given, layer.weight)
    assert known is not None
    assert known.share == 1
    for places, given in zip(packed.sequences, inputs, strict=True):
        expected = (given.double() @ layer.weight.double().T)[:-1]
        torch.testing.assert_close(found[places[:-1]].double(), expected, atol=1e-5, rtol=0)
    head = drawn.model.network.lm_head.weight
    logits = [drawn.model.network(torch.tensor([[*t.prompt, *t.completion]])).logits[0] for t in tokens]
    predicting = [x[len(t.prompt) - 1 : -1] for x, t in zip(logits, tokens, strict=True)]
    states = drawn.states(packed)
    torch.testing.assert_close(known.predicted(head, states)(slice(0, 99)), torch.cat(predicting), atol=1e-5, rtol=0)


def test_a_product_that_is_looked_up_is_derived_from_as_a_product(drawn):
    packed = Packed.of(drawn.draw(), range(4), SHARED)
    module, inputs = drawn.model.network.model.layers[1].mlp.up_proj, []
    module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    drawn.scorer(packed, ("logps",))
    weight, given = module.weight, inputs[0].detach().requires_grad_()
    slope = torch.randn(*packed.ids.shape, len(weight))
    expected = torch.autograd.grad(linear(given, weight), (given, weight), slope)
    drawn.recall.kept[id(weight)].whole(drawn.recall.size).rows.add_(1)  # so that it shows whether they are looked up
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


def test_a_layer_that_is_given_something_else_computes():
    """Other tokens, the same in another order, or a second call in the same pass: as experts and shared layers are."""
    recall, layer, given = Recall(1 << 20, pytest.fail), nn.Linear(8, 2, bias=False), torch.randn(4, 8)
    other = torch.randn(4, 8)
    with recall.hearing(4):
        for x in (other, given):
            recall.heard(layer.weight, marks(x), layer(x))
        recall.heard(nn.Linear(8, 2).weight, marks(given[:3]), layer(given[:3]))
    recall.heard(layer.weight, marks(torch.zeros(5, 8)), torch.zeros(5, 2))  # of no pass
    assert list(recall.kept) == [id(layer.weight)]
    assert len(recall.kept[id(layer.weight)].passes) == 2
    at = recall.kept[id(layer.weight)].at
    places, order = torch.arange(4), [2, 0, 1, 3]
    found = at(places, given, recall.size)
    assert found is not None
    assert torch.equal(recall.kept[id(layer.weight)].whole(4).rows[found], layer(given))
    assert at(places, other, recall.size) is None
    assert at(places, given[order], recall.size) is None
    assert at(torch.tensor([0, 1, ROOT, 3]), given[[0, 1, 0, 3]], recall.size) is not None


def test_a_product_that_was_changed_in_place_is_computed(drawn):
    """As the sampler does with logits where a minimum of tokens is asked for."""
    tokens = drawn.draw(min_new_tokens=3)
    packed = Packed.of(tokens, range(4), SHARED)
    known = drawn.recall.of(packed)
    assert known is not None
    assert known.predicted(drawn.model.network.lm_head.weight, drawn.states(packed)) is None


def test_nothing_is_known_of_a_pass_that_comes_after_something_was_looked_up(drawn):
    packed = Packed.of(drawn.draw(), range(4), SHARED)
    known = drawn.recall.of(packed)
    assert known is not None
    assert known.predicted(drawn.model.network.lm_head.weight, drawn.states(packed)) is not None
    drawn.draw()
    assert drawn.recall.of(packed) is None


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


def test_later_updates_of_a_step_compute_everything(tiny_model, tmp_path, capsys, monkeypatch):
    """At a small rate: the first update of AdamW makes whole ones of gradients that are nothing but rounding."""
    algorithm = {**SECTIONS["algorithm"], "inner_epochs": 2, "minibatches": 2}
    sections = {"algorithm": algorithm, "optim": {"batch_size": 8, "lr": 1e-5}, "run": {"steps": 1}}
    (usual,), _ = trained(tiny_model, tmp_path / "usual", capsys, **sections)
    of, passes = Recall.of, []
    monkeypatch.setattr(Recall, "of", lambda self, packed: passes.append(of(self, packed)) or passes[-1])
    (again,), _ = trained(tiny_model, tmp_path / "again", capsys, **sections, rollout={"reuse_bytes": 1 << 28})
    known = [one is not None for one in passes]
    assert known == sorted(known, reverse=True)
    assert known.count(False) >= 3
    assert again["sampler/reused"] == 1
    assert again["gradient/norm"] == pytest.approx(usual["gradient/norm"], rel=1e-3)


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


def test_a_run_without_room_says_that_alone(tiny_model, tmp_path, capsys):
    _, said = trained(tiny_model, tmp_path / "run", capsys, rollout={"reuse_bytes": 20_000})
    assert said.count("nothing of the draws is reused: a step takes more than rollout.reuse_bytes, 20,000") == 1
    assert "no effect" not in said


def test_a_run_whose_sampler_keeps_nothing_says_so_once(tiny_model, tmp_path, capsys):
    sampler = {"name": "plain", "max_new_tokens": 6}
    lines, said = trained(tiny_model, tmp_path / "run", capsys, rollout={"reuse_bytes": 1 << 28}, sampler=sampler)
    assert said.count("rollout.reuse_bytes has no effect: nothing that a step had drawn was looked up in it") == 1
    assert [line["sampler/reused"] for line in lines] == [0.0] * 4


def test_a_model_whose_numbers_would_be_others_is_left_alone(tiny_model, tmp_path, capsys, monkeypatch):
    """Here what is kept is not what was computed."""
    heard = Recall.heard
    monkeypatch.setattr(Recall, "heard", lambda self, matrix, marked, x: heard(self, matrix, marked, 1.01 * x))
    _, said = trained(tiny_model, tmp_path / "run", capsys, rollout={"reuse_bytes": 1 << 28})
    assert "rollout.reuse_bytes has no effect: numbers differ by" in said


def test_a_model_that_refuses_is_left_alone(tiny_model, tmp_path, capsys, monkeypatch):
    """As one may that writes into what a layer gave it."""

    def refuse(self: Known, matrix: torch.Tensor, states: torch.Tensor) -> None:
        raise RuntimeError("a view is being modified")

    monkeypatch.setattr(Known, "predicted", refuse)
    lines, said = trained(tiny_model, tmp_path / "run", capsys, rollout={"reuse_bytes": 1 << 28})
    assert "rollout.reuse_bytes has no effect: RuntimeError: a view is being modified" in said
    assert len(lines) == 4


def test_a_model_without_large_matrices_is_told_of(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fewrows, "LEAST", 1 << 16)
    _, said = trained(tiny_model, tmp_path / "run", capsys, rollout={"reuse_bytes": 1 << 28})
    assert "rollout.reuse_bytes has no effect: this model is not drawn from in the fastest way" in said


def test_a_mixture_of_experts_computes_what_its_experts_are_given(tmp_path, capsys):
    """Each expert has some of the tokens, in an order of its own."""
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    build_tiny(tmp_path / "model", model_type="mixtral", **more)
    usual, _ = trained(tmp_path / "model", tmp_path / "usual", capsys)
    again, said = trained(tmp_path / "model", tmp_path / "again", capsys, rollout={"reuse_bytes": 1 << 28})
    assert "reuse" not in said
    for one, other in zip(usual, again, strict=True):
        assert other["gradient/norm"] == pytest.approx(one["gradient/norm"], rel=1e-2)
        assert other["sampler/reused"] > 0.5


@pytest.mark.parametrize("redraws", [0, 2])
def test_a_resumed_run_goes_on_to_the_same_bytes(tiny_model, tmp_path, capsys, monkeypatch, redraws):
    """Its third step is in the journal: it is drawn again, and looked up, also what was drawn in place of groups that
    are not worth it."""
    sections = {
        "rollout": {"reuse_bytes": 1 << 28, "redraws": redraws},
        "run": {"steps": 5, "checkpoint": {"every": 2}},
    }
    monkeypatch.setattr(RolloutAlgorithm, "keep", lambda self, group: group.index % 2 == 0 or not redraws)
    trained(tiny_model, tmp_path / "whole", capsys, **sections)
    notify = Session._notify

    def stopping(self: Session, hook: str, **arguments: object) -> None:
        notify(self, hook, **arguments)
        if arguments.get("step") == 3 and hook == "prefopt_step_finished":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_notify", stopping)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny_model, tmp_path / "part", capsys, **sections)
    train_on(tiny_model, tmp_path / "part", {**SECTIONS, **sections}, resume=True)
    for name in ("metrics.jsonl", "model/model.safetensors", "rollouts.parquet"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
