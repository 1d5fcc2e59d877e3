"""Loading models: what is damaged or incomplete is refused, never filled up in silence."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefopt.config import ModelConfig
from prefopt.data.render import load_tokenizer
from prefopt.engine import models
from prefopt.engine.models import load_causal, load_classifier, open_model, reader
from prefopt.engine.services import EngineServices
from prefopt.errors import ConfigError, ResourceError
from prefopt.testing.tiny import build_tiny

EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def copy(tiny_model, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "copy")


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_truncated_weights_are_said_to_be_damaged(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ResourceError, match="are damaged") as caught:
        load_causal(ModelConfig(path=str(copy)))
    assert "again" in caught.value.problems[0].fix


def test_weights_of_another_shape_are_named(copy):
    rewrite(copy, lambda weights: weights.update({QUERY: torch.zeros(3, 3)}))
    with pytest.raises(ConfigError, match=f"{QUERY} has shape \\[3, 3\\], but config.json asks for \\[24, 24\\]"):
        load_causal(ModelConfig(path=str(copy)))


@pytest.mark.parametrize("load", [load_causal, lambda c: load_classifier(c, load_tokenizer(c.path), 0)])
def test_missing_weights_are_not_drawn_at_random(copy, load):
    rewrite(copy, lambda weights: weights.pop(QUERY))
    with pytest.raises(ConfigError, match=f"the weights have no {QUERY}"):
        load(ModelConfig(path=str(copy)))


def test_tied_weights_are_not_missing(tmp_path):
    build_tiny(tmp_path / "tied", tie_word_embeddings=True)
    network = load_causal(ModelConfig(path=str(tmp_path / "tied")))
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_tied_weights_may_be_stored_under_either_name(tmp_path):
    """As some published checkpoints do; a classifier has no other head to read them by."""
    build_tiny(tmp_path / "tied", tie_word_embeddings=True)
    whole = load_causal(ModelConfig(path=str(tmp_path / "tied"))).model.embed_tokens.weight
    rewrite(tmp_path / "tied", lambda weights: weights.update({"lm_head.weight": weights.pop(EMBEDDING)}))
    config = ModelConfig(path=str(tmp_path / "tied"))
    assert torch.equal(load_causal(config).model.embed_tokens.weight, whole)
    classifier = load_classifier(config, load_tokenizer(config.path), 0)
    assert torch.equal(classifier.model.embed_tokens.weight, whole)


def test_a_policy_is_no_reward_model_and_a_reward_model_no_policy(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="is no reward model: its architecture is LlamaForCausalLM"):
        EngineServices(0).scorer(str(tiny_model))
    classifier = load_classifier(ModelConfig(path=str(tiny_model)), load_tokenizer(str(tiny_model)), 0)
    classifier.save_pretrained(tmp_path / "reward")
    with pytest.raises(ConfigError, match="the weights have no lm_head.weight"):
        load_causal(ModelConfig(path=str(tmp_path / "reward")))


def test_a_classifier_is_known_by_what_was_loaded_and_not_by_its_path(tiny_model, tmp_path, monkeypatch):
    """A hub name is not a folder; its head must not be drawn anew."""
    tokenizer = load_tokenizer(str(tiny_model))
    first = load_classifier(ModelConfig(path=str(tiny_model)), tokenizer, 0)
    first.save_pretrained(tmp_path / "reward")
    load = models.AutoModelForSequenceClassification.from_pretrained
    cached = SimpleNamespace(from_pretrained=lambda name, **options: load(tmp_path / "reward", **options))
    monkeypatch.setattr(models, "AutoModelForSequenceClassification", cached)
    again = load_classifier(ModelConfig(path="someone/reward"), tokenizer, 1)
    assert torch.equal(first.score.weight, again.score.weight)


def test_reading_settings_of_a_broken_model_is_an_error_with_a_place(copy):
    (copy / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ConfigError) as caught:
        reader(ModelConfig(path=str(copy)), None)
    assert caught.value.problems[0].where == "model.path"


def test_a_base_model_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(models.PreTrainedTokenizerFast, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_tiny(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    monkeypatch.undo()
    build_tiny(tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_model_is_opened_with_its_settings(tiny_model):
    opened = open_model(ModelConfig(path=str(tiny_model), attention="eager"), torch.device("cpu"))
    assert opened.network.config._attn_implementation == "eager"
