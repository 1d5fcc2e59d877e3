"""Small random models of every architecture that is tested."""

from __future__ import annotations

import pytest

from prefopt.engine.models import build
from prefopt.testing.tiny import tiny_recipe

SHAPE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GQA = {**SHAPE, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 128}
FAMILIES = {
    "llama": {**GQA, "tie_word_embeddings": True},
    "qwen2": {**GQA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": GQA,
    "mistral": {**GQA, "sliding_window": 4},
    "gemma2": {**GQA, "sliding_window": 4, "query_pre_attn_scalar": 12, "final_logit_softcapping": 2.0},
    "gemma3_text": {**GQA, "sliding_window": 4, "query_pre_attn_scalar": 12},
    "granite": {**GQA, "logits_scaling": 3.0},
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


@pytest.fixture(scope="module", params=FAMILIES)
def architecture(request, tmp_path_factory):
    """The folder of such a model."""
    recipe = tiny_recipe()
    kept = {"initializer_range": 0.1, "model_type": request.param, **FAMILIES[request.param]}
    folder = tmp_path_factory.mktemp(request.param) / "model"
    build(type(recipe)(kept, recipe.tokenizer, recipe.special_tokens), folder, seed=0)
    return folder
