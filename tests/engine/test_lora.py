"""Adapters: they change nothing at first, are all that is trained, and leave a run in two forms that agree."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt.config import load_run
from prefopt.errors import ConfigError
from prefopt.plugins import load
from prefopt.testing.tiny import train_on

LORA = {"rank": 4, "alpha": 8.0}
IDS = torch.tensor([[5, 9, 20, 33, 41, 12]])


def run(tiny_model: Path, folder: Path, algorithm: str, lora: dict | None = None, **sections):
    model = {"path": str(tiny_model), "lora": LORA if lora is None else lora}
    sections = {"algorithm": {"name": algorithm}, "model": model, **sections}
    return train_on(tiny_model, folder, sections)


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(IDS).logits


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "orpo", "kto", "tdpo2", "reward_model"])
def test_the_merged_model_computes_what_base_and_adapter_do(tiny_model, tmp_path, algorithm):
    result = run(tiny_model, tmp_path / "run", algorithm)
    auto = AutoModelForSequenceClassification if algorithm == "reward_model" else AutoModelForCausalLM
    options = {"num_labels": 1} if algorithm == "reward_model" else {}
    merged = auto.from_pretrained(result.model)
    base = auto.from_pretrained(tiny_model, pad_token_id=merged.config.pad_token_id, **options)
    if algorithm == "reward_model":
        base.resize_token_embeddings(merged.config.vocab_size, mean_resizing=False)
    before = logits(base).clone()
    apart = PeftModel.from_pretrained(base, str(result.folder / "adapter"))
    assert (logits(merged) - logits(apart)).abs().max() < 1e-5
    assert (logits(merged) - before).abs().max() > 1e-3


def test_only_adapters_are_trained_and_kept(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path / "run", "dpo")
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_model, result.model))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)
    (last,) = sorted((result.folder / "checkpoints").glob("*4"))
    kept = load_file(last / "model.safetensors")
    assert kept
    assert all(".lora_" in name for name in kept)


def test_the_reference_is_the_policy_without_its_adapters(tiny_model, tmp_path):
    found = [
        losses(run(tiny_model, tmp_path / mode, "dpo", reference={"mode": mode}).folder)
        for mode in ("cached", "resident")
    ]
    assert found[0][0]["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    for one, other in zip(*found, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
    assert found[0][-1]["loss/total"] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("mode", ["cached", "resident"])
def test_an_adapter_that_is_continued_is_its_own_reference(tiny_model, tmp_path, mode):
    first = run(tiny_model, tmp_path / "first", "sft")
    lora = {"path": str(first.folder / "adapter")}
    second = run(tiny_model, tmp_path / "second", "dpo", lora, reference={"mode": mode})
    assert losses(second.folder)[0]["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    merged, before = (load_file(r.model / "model.safetensors") for r in (second, first))
    assert 0 < max(float((merged[n] - before[n]).abs().max()) for n in before) < 0.2


def test_a_run_with_adapters_goes_on_byte_for_byte(tiny_model, tmp_path):
    whole = run(tiny_model, tmp_path / "whole", "dpo", run={"steps": 4})
    other = run(tiny_model, tmp_path / "other", "dpo", run={"steps": 4})
    for path in (other.folder / "result.json", *sorted((other.folder / "checkpoints").glob("*4/*"))):
        path.unlink()
    sorted((other.folder / "checkpoints").glob("*4"))[0].rmdir()
    sections = {"algorithm": {"name": "dpo"}, "model": {"path": str(tiny_model), "lora": LORA}, "run": {"steps": 4}}
    again = train_on(tiny_model, tmp_path / "other", sections, resume=True)
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_a_run_that_continues_an_adapter_can_be_read_and_resumed(tiny_model, tmp_path):
    first = run(tiny_model, tmp_path / "first", "sft")
    lora = {"path": str(first.folder / "adapter")}
    second = run(tiny_model, tmp_path / "second", "dpo", lora)
    config = load_run(second.folder / "config.yaml", load().find)
    assert config.model.lora.path == lora["path"]
    (second.folder / "result.json").unlink()
    again = train_on(
        tiny_model,
        second.folder,
        {"algorithm": {"name": "dpo"}, "model": {"path": str(tiny_model), "lora": lora}},
        resume=True,
    )
    assert again.outcome == "finished"


def test_a_reward_model_s_adapter_is_continued_with_its_head(tiny_model, tmp_path):
    first = run(tiny_model, tmp_path / "first", "reward_model")
    lora = {"path": str(first.folder / "adapter")}
    second = run(tiny_model, tmp_path / "second", "reward_model", lora, optim={"lr": 1e-12})
    merged, before = (load_file(r.model / "model.safetensors") for r in (second, first))
    assert merged.keys() == before.keys()
    for name, x in merged.items():
        assert torch.allclose(x, before[name], atol=1e-6), name


def test_an_adapter_that_is_no_plain_one_is_refused(tiny_model, tmp_path):
    first = run(tiny_model, tmp_path / "first", "sft")
    settings = first.folder / "adapter/adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "use_dora": True}))
    with pytest.raises(ConfigError, match="no plain LoRA: it has use_dora"):
        run(tiny_model, tmp_path / "second", "sft", {"path": str(settings.parent)})


def test_score_heads_are_trained_whole_and_saved_with_the_adapter(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path / "run", "reward_model")
    kept = load_file(result.folder / "adapter/adapter_model.safetensors")
    assert "base_model.model.score.weight" in kept
    assert json.loads((result.folder / "adapter/adapter_config.json").read_text())["modules_to_save"] == ["score"]


ONLINE = {
    "reward": {"name": "length", "unit": "characters", "minimum": 8, "margin": 8},
    "sampler": {"name": "plain", "max_new_tokens": 6},
}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_method_that_samples_draws_from_and_learns_in_its_adapter(tiny_model, tmp_path, algorithm):
    """Its value head is trained and saved whole, beside both forms of the model."""
    sections = {"algorithm": {"name": algorithm, "beta": 0.05}, "model": {"path": str(tiny_model), "lora": LORA}}
    result = train_on(tiny_model, tmp_path / "run", {**sections, **ONLINE})
    lines = [line for line in losses(result.folder) if "sampler/gap" in line]
    assert max(line["sampler/gap"] for line in lines) < 1e-5
    assert lines[0]["kl/sequence"] == pytest.approx(0.0, abs=1e-5)  # the reference is the policy without its adapters
    assert abs(lines[-1]["kl/sequence"]) > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(result.model)
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(result.folder / "adapter"))
    assert (logits(merged) - logits(apart)).abs().max() < 1e-5
    heads = list(result.folder.glob("**/value_head.safetensors"))
    assert bool(heads) == (algorithm == "ppo")
    assert all(load_file(head)["value_head.weight"].abs().max() > 1e-4 for head in heads)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["nothing"]}, "the adapter cannot be attached"),
        ({"path": "/nowhere"}, "the adapter cannot be attached"),
        ({"targets": ["lm_head", "q_proj"]}, "the head cannot have an adapter"),
        ({"targets": ["embed_tokens"]}, "the embedding cannot have an adapter"),
    ],
)
def test_what_cannot_be_is_said(tiny_model, tmp_path, lora, message):
    with pytest.raises(ConfigError, match=message):
        run(tiny_model, tmp_path / "run", "dpo", lora)


def test_an_adapter_brings_its_own_rank(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="brings its own rank"):
        run(tiny_model, tmp_path / "run", "dpo", {"path": "/nowhere", "rank": 3})
