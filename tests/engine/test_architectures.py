"""The plain path on small random models of many families: padding changes nothing, and they train and reload."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt.data.render import Tokens
from prefopt.engine.forward import Scorer, run
from prefopt.engine.models import build
from prefopt.testing.tiny import tiny_recipe

SHAPE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GQA = {**SHAPE, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 128}
FAMILIES = {
    "llama": {**GQA, "tie_word_embeddings": True},
    "qwen2": GQA,
    "qwen3": GQA,
    "mistral": {**GQA, "sliding_window": 4},
    "gemma3_text": {**GQA, "sliding_window": 4, "query_pre_attn_scalar": 12},
    "phi3": {**GQA, "pad_token_id": 0},
    "olmo2": GQA,
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 128, "resid_pdrop": 0.5, "attn_pdrop": 0.5},
    "gpt_neox": {**SHAPE, "max_position_embeddings": 128},
    "opt": {
        "hidden_size": 24,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 24,
        "max_position_embeddings": 128,
    },
}
CPU = torch.device("cpu")
TOKENS = [Tokens((5, 6, 7), (8, 9, 1)), Tokens((5,), (6, 7, 8, 9, 10, 11, 1)), Tokens((9,) * 9, (3,))]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    recipe = tiny_recipe()
    kept = {"initializer_range": 0.1, "model_type": request.param, **FAMILIES[request.param]}
    folder = tmp_path_factory.mktemp(request.param) / "model"
    build(type(recipe)(kept, recipe.tokenizer, recipe.special_tokens), folder, seed=0)
    return folder


def test_a_sequence_has_the_same_log_probabilities_alone_and_padded(model):
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    together = run(Scorer(network, values=True), TOKENS, ("logps", "entropy", "values"), CPU)
    for i, tokens in enumerate(TOKENS):
        ids = torch.tensor([[*tokens.prompt, *tokens.completion]])
        start, size = len(tokens.prompt), len(tokens.completion)
        with torch.no_grad():
            logps = torch.log_softmax(network(ids).logits[0].double(), -1)[start - 1 : -1]
        expected = logps.gather(1, ids[0, start:, None]).squeeze(1)
        assert torch.allclose(together["logps"][i, :size].double(), expected, atol=1e-5)


def test_it_trains_by_dpo_and_reloads(model, train_tiny):
    result = train_tiny(algorithm={"name": "dpo"}, model={"path": str(model)}, run={"steps": 2})
    reloaded = AutoModelForCausalLM.from_pretrained(result.model).state_dict()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert any(not torch.equal(reloaded[name], before[name]) for name in before)


def test_it_trains_as_a_reward_model_and_reloads(model, train_tiny):
    result = train_tiny(algorithm={"name": "reward_model"}, model={"path": str(model)}, run={"steps": 2})
    network = AutoModelForSequenceClassification.from_pretrained(result.model)
    saved = load_file(max(result.folder.glob("checkpoints/step-*")) / "model.safetensors")
    assert torch.equal(network.score.weight, saved["network.score.weight"])
