"""The scorer against one sequence at a time, computed by hand from the model's logits."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from prefopt.data.render import Tokens
from prefopt.engine.forward import Scorer, run
from prefopt.engine.layout import PLAIN, Paths
from prefopt.errors import ConfigError

CPU = torch.device("cpu")
TOKENS = [Tokens((5, 6, 7), (8, 9, 1)), Tokens((5,), (6, 7, 8, 9, 10, 1)), Tokens((9, 9, 9, 9, 9), (3,))]


@pytest.fixture(scope="module")
def network(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def by_hand(network, tokens: Tokens) -> list[float]:
    """log p of each completion token from the logits one position before it."""
    ids = [*tokens.prompt, *tokens.completion]
    with torch.no_grad():
        logps = torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), -1)
    return [float(logps[i - 1, ids[i]]) for i in range(len(tokens.prompt), len(ids))]


def test_each_token_is_scored_by_the_logits_before_it_whatever_stands_beside_it(network):
    found = run(Scorer(network), TOKENS, ("logps",), CPU)["logps"]
    assert found.shape == (3, 6)
    for row, tokens in zip(found, TOKENS, strict=True):
        size = len(tokens.completion)
        assert row[:size].tolist() == pytest.approx(by_hand(network, tokens), abs=1e-5)
        assert row[size:].abs().sum() == 0


def test_entropy_is_that_of_the_distribution_a_token_was_drawn_from(network):
    found = run(Scorer(network), TOKENS[:1], ("entropy", "logps"), CPU)
    with torch.no_grad():
        p = torch.softmax(network(torch.tensor([[5, 6, 7, 8, 9, 1]])).logits[0, 2:5].double(), -1)
    assert found["entropy"][0].tolist() == pytest.approx((-(p * p.log()).sum(-1)).tolist(), abs=1e-5)


def test_collision_entropy_is_that_of_its_definition_on_every_path_and_has_no_gradient(network):
    with torch.no_grad():
        p = torch.softmax(network(torch.tensor([[5, 6, 7, 8, 9, 1]])).logits[0, 2:5].double(), -1)
    for paths in (PLAIN, Paths("causal", tiled=True)):
        found = run(Scorer(network, paths=paths), TOKENS[:1], ("collision_entropy", "logps"), CPU)
        assert found["collision_entropy"][0].tolist() == pytest.approx((-(p * p).sum(-1).log()).tolist(), abs=1e-5)
        assert found["logps"].requires_grad
        assert not found["collision_entropy"].requires_grad


def test_a_value_is_that_of_the_state_before_its_token(network):
    scorer = Scorer(network, values=True)
    assert run(scorer, TOKENS, ("values",), CPU)["values"].abs().sum() == 0  # the head starts at zero
    with torch.no_grad():
        scorer.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = run(scorer, TOKENS, ("values", "logps"), CPU)["values"]
    with torch.no_grad():
        hidden = network(torch.tensor([[5, 6, 7, 8, 9, 1]]), output_hidden_states=True).hidden_states[-1][0, 2:5]
    assert found[0, :3].tolist() == pytest.approx(scorer.value_head(hidden).squeeze(-1).tolist(), abs=1e-5)


def test_a_score_is_read_at_the_last_real_token(tiny_model):
    network = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32).eval()
    together = run(Scorer(network), TOKENS, ("scores",), CPU)["scores"]
    for score, tokens in zip(together.tolist(), TOKENS, strict=True):
        ids = torch.tensor([[*tokens.prompt, *tokens.completion]])
        with torch.no_grad():
            last = network.score(network.base_model(ids).last_hidden_state[0, -1])
        assert score == pytest.approx(float(last), abs=1e-5)


def test_bfloat16_stays_close_to_float32(network):
    exact = run(Scorer(network), TOKENS, ("logps",), CPU)["logps"]
    half = run(Scorer(network), TOKENS, ("logps",), CPU, "bfloat16")["logps"]
    assert half.dtype == torch.float32
    assert torch.allclose(exact, half, atol=0.1)
    assert not torch.equal(exact, half)


def test_dropout_never_acts(tiny_model, network):
    scorer = Scorer(network)
    first, second = (run(scorer, TOKENS, ("logps",), CPU)["logps"] for _ in range(2))
    assert torch.equal(first, second)
    assert not scorer.network.training


def made(hidden: int, words: int = 50, **settings) -> Scorer:
    torch.manual_seed(hidden)
    shape = {"hidden_size": hidden, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Scorer(LlamaForCausalLM(LlamaConfig(vocab_size=words, **shape)), **settings)


def test_a_reference_of_another_size_is_compared_on_the_fast_path(network):
    fast = [Paths("shared", tiled=True, reach=reach) for reach in (10.0, 20.0)]
    heard: list[str] = []
    found = {}
    for name, paths in {"fast": fast, "plain": [PLAIN, PLAIN]}.items():
        scorer = made(8, paths=paths[0])
        scorer.compare_with(made(16, paths=paths[1]), heard.append)
        found[name] = run(scorer, TOKENS, ("token_kl",), CPU)["token_kl"]
        assert scorer.paths is paths[0]
    assert torch.allclose(found["fast"], found["plain"], atol=1e-6)
    assert found["plain"][found["plain"] != 0].detach().min() > 1e-6
    assert not heard


def test_a_reference_without_the_same_shortcuts_sends_both_to_the_plain_path():
    heard: list[str] = []
    scorer, other = made(8, paths=Paths("shared", tiled=True)), made(16, paths=Paths("causal"))
    scorer.compare_with(other, heard.append)
    assert scorer.paths is other.paths is PLAIN
    assert heard == ["model and reference do not allow the same shortcuts: both take the plain path"]


def test_a_reference_with_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="a vocabulary of 60 tokens, the model one of 50"):
        made(8).compare_with(made(8, 60), print)


def test_a_head_that_no_loss_reaches_keeps_no_gradient():
    """AdamW would let its weights decay by a gradient of zero."""
    scorer = made(8, paths=Paths("shared", tiled=True))
    assert len(scorer.accumulate_in_place(head_is_used=False)) == 1
    assert scorer.network.lm_head.weight.grad is None
    assert len(scorer.accumulate_in_place(head_is_used=True)) == 2
