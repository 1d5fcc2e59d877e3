"""The plain path on small random models of many families: padding changes nothing, and they train and reload."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.api import Request
from prefopt.builtin.continuous import Continuous
from prefopt.builtin.samplers import Plain
from prefopt.data.render import Tokens, load_tokenizer
from prefopt.engine import fewrows
from prefopt.engine.forward import Scorer, run
from prefopt.engine.lastlayer import spared
from prefopt.engine.layout import PLAIN, Paths
from prefopt.engine.models import Model
from prefopt.engine.probe import probe
from prefopt.engine.recall import Recall, _Looked
from prefopt.engine.recompute import prepare

CPU = torch.device("cpu")
PAIRS = [
    Tokens((5, 6, 7, 12, 13, 14), (8, 9, 1)),
    Tokens((5, 6, 7, 12, 13, 14), (8, 9, 10, 11, 15, 16, 1)),
    Tokens((20, 21), (6, 7, 1)),
    Tokens((20, 21), (9, 1)),
    Tokens((9,) * 9, (3,)),
]
TOKENS = [Tokens((5, 6, 7), (8, 9, 1)), Tokens((5,), (6, 7, 8, 9, 10, 11, 1)), Tokens((9,) * 9, (3,))]


@pytest.fixture(scope="module")
def model(architecture):
    return architecture


def test_a_sequence_has_the_same_log_probabilities_alone_and_padded(model):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    together = run(Scorer(network), TOKENS, ("logps",), CPU)["logps"]
    for i, tokens in enumerate(TOKENS):
        ids = torch.tensor([[*tokens.prompt, *tokens.completion]])
        start, size = len(tokens.prompt), len(tokens.completion)
        with torch.no_grad():
            logps = torch.log_softmax(network(ids).logits[0].double(), -1)[start - 1 : -1]
        expected = logps.gather(1, ids[0, start:, None]).squeeze(1)
        assert torch.allclose(together[i, :size].double(), expected, atol=1e-5)


def test_the_fastest_path_holds(model):
    heard: list[str] = []
    paths = probe(Scorer(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)), heard.append)
    assert (paths.layout, paths.tiled, heard) == ("shared", True, [])


@pytest.mark.parametrize("layout", ["causal", "shared"])
def test_fast_equals_plain_in_value_and_gradient(model, layout):
    """To 1e-5, for every budget of the head, with and without a prompt to share, with gradients in place or not, with
    all of the last layer or what is looked at."""
    expected, names = outputs_and_slopes(model, PLAIN), spared(causal(model))
    assert names
    for keep_bytes, in_place, less in ((0, False, ()), (1 << 20, True, names)):
        paths = Paths(layout, tiled=True, keep_bytes=keep_bytes, spared=less)
        found = outputs_and_slopes(model, paths, in_place)
        for name, x in expected.items():
            assert torch.allclose(found[name], x, atol=1e-5), name


def test_rows_in_slots_are_drawn_as_plain_ones(model):
    """The same tokens and log-probabilities, without a fallback, beyond the sliding windows."""
    heard: list[str] = []
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    opened = Model(network, load_tokenizer(str(model)), CPU, heard.append)
    wanted = [Request(((5, 6, 7, 12, 13, 14), (20,), (9, 8, 7))[i % 3], i) for i in range(9)]
    plain, slots = (
        dict(sampler.open(opened)(wanted))
        for sampler in (Plain(max_new_tokens=9), Continuous(max_new_tokens=9, slots=4))
    )
    assert not heard
    for i, completion in plain.items():
        assert slots[i].ids == completion.ids
        assert slots[i].logps == pytest.approx(completion.logps, abs=1e-5)


@pytest.mark.parametrize("tiled", [True, False])
def test_what_drawing_computed_is_looked_up(model, tiled, monkeypatch):
    """Rows that move between slots and share prompts: the same numbers and gradients, each linear layer looked up."""
    monkeypatch.setattr(fewrows, "LEAST", 1)
    scorer, recall = Scorer(causal(model)), Recall(1 << 30, pytest.fail)
    scorer.paths = Paths("shared", tiled=tiled, spared=spared(scorer.network))
    drawn = Model(scorer.network, load_tokenizer(str(model)), CPU, pytest.fail, recall)
    prompts = [((5, 6, 7, 12, 13, 14), (20,), (9, 8, 7))[i // 3] for i in range(9)]
    found = dict(Continuous(max_new_tokens=9, slots=4).open(drawn)([Request(p, i) for i, p in enumerate(prompts)]))
    tokens, groups = [Tokens(p, found[i].ids) for i, p in enumerate(prompts)], [i // 3 for i in range(9)]
    assert len({len(t.completion) for t in tokens}) > 1
    expected, looked_up = logps_and_slopes(scorer, tokens, groups), []
    scorer.recall = recall
    forward = _Looked.forward
    monkeypatch.setattr(_Looked, "forward", lambda ctx, *given: looked_up.append(given[1]) or forward(ctx, *given))
    again = logps_and_slopes(scorer, tokens, groups)
    assert recall.share == 1 or not tiled  # whole logits are those of prompts too, which are not drawn
    layers = [m.weight for m in scorer.network.base_model.modules() if isinstance(m, torch.nn.Linear)]
    assert {id(p) for p in layers} <= {id(p) for p in looked_up}
    for name, x in expected.items():
        assert float((again[name] - x).abs().max() / (1 + x.abs().max())) < 1e-5, name


def logps_and_slopes(scorer: Scorer, tokens: list[Tokens], groups: list[int]) -> dict[str, torch.Tensor]:
    """Log-probabilities, and the gradient of a weighted sum of them by every parameter."""
    scorer.zero_grad()
    logps = run(scorer, tokens, ("logps",), CPU, groups=groups)["logps"]
    (logps * torch.linspace(-1, 2, logps.numel()).view_as(logps)).sum().backward()
    return {"logps": logps, **{name: p.grad for name, p in scorer.named_parameters() if p.grad is not None}}


def without_classifier(model) -> None:
    if "granite" in str(model):
        pytest.skip("transformers has no sequence classifier for Granite")


def outputs_and_slopes(model, paths: Paths, in_place: bool = False, recompute: bool = False) -> dict[str, torch.Tensor]:
    """What two pairs and a single sequence give beside a reference, and the gradient of a weighted sum by every
    parameter."""
    torch.manual_seed(0)
    scorer, other = (Scorer(causal(model), values=i == 0, paths=paths) for i in range(2))
    torch.nn.init.normal_(scorer.value_head.weight)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
    heard: list[str] = []
    scorer.compare_with(other, heard.append)
    assert not in_place or scorer.accumulate_in_place(head_is_used=True)
    calls = []
    layer = next(m for m in scorer.network.modules() if isinstance(m, GradientCheckpointingLayer))
    inside = next(m for m in layer.modules() if "Norm" in type(m).__name__)
    inside.register_forward_pre_hook(lambda *_: calls.append("inside"))
    if recompute:
        scorer.recomputed = prepare(scorer.network)
    outputs = run(scorer, PAIRS, ("logps", "entropy", "values", "token_kl"), CPU, groups=[0, 0, 1, 1, 2])
    weights = torch.linspace(-1, 2, outputs["logps"].numel()).view_as(outputs["logps"])
    sum((x * weights).mean() for x in outputs.values()).backward()
    assert len(calls) == (2 if recompute else 1)
    assert not heard
    return {**outputs, **{name: p.grad for name, p in scorer.named_parameters() if p.grad is not None}}


def causal(model) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def test_layers_computed_again_give_the_same_numbers(model):
    """Without their dropout, and each layer really twice."""
    expected, found = (outputs_and_slopes(model, Paths("shared", tiled=True), recompute=r) for r in (False, True))
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        assert torch.allclose(found[name], x, atol=1e-6), name


def test_scores_of_a_reward_model_are_the_same_on_every_path(model):
    without_classifier(model)
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    plain, shared = (
        run(Scorer(network, paths=paths), PAIRS, ("scores",), CPU, groups=[0, 0, 1, 1, 2])["scores"]
        for paths in (PLAIN, Paths("shared", spared=spared(network)))
    )
    assert torch.allclose(plain, shared, atol=1e-5)


def sections(model) -> dict[str, str]:
    """What a configuration says of this model: Gemma 2 caps attention scores, which sdpa cannot."""
    return {"path": str(model), "attention": "eager" if "gemma2" in str(model) else "sdpa"}


def test_it_trains_by_dpo_and_reloads(model, train_tiny):
    result = train_tiny(algorithm={"name": "dpo"}, model=sections(model), run={"steps": 2})
    reloaded = AutoModelForCausalLM.from_pretrained(result.model).state_dict()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert any(not torch.equal(reloaded[name], before[name]) for name in before)


def test_it_trains_as_a_reward_model_and_reloads(model, train_tiny):
    without_classifier(model)
    result = train_tiny(algorithm={"name": "reward_model"}, model=sections(model), run={"steps": 2})
    network = AutoModelForSequenceClassification.from_pretrained(result.model)
    saved = load_file(max(result.folder.glob("checkpoints/step-*")) / "model.safetensors")
    assert torch.equal(network.score.weight, saved["network.score.weight"])
