"""A model and data small enough for tests: letters, two layers, a few rows of every kind."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.components import Algorithm, Recipe
from prefopt.config import Document, RunConfig, run_from
from prefopt.engine.models import build
from prefopt.plugins import Plugins, load
from prefopt.session import Result, train

SPECIAL = ("<pad>", "<end>", "<unk>")
ROWS = 24


def tiny_recipe(**config: Any) -> Recipe:
    """A Llama of two layers over printable letters; keyword arguments change its configuration."""
    added = [
        {"id": i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(SPECIAL)
    ]
    letters = [*SPECIAL, *(c for c in string.printable if c not in "\r\x0b\x0c")]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(letters)}, "unk_token": "<unk>"},
    }
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"model_type": "llama", **shape, "num_key_value_heads": 2, "max_position_embeddings": 128}
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    return Recipe({**settings, "initializer_range": 0.1, **config}, tokenizer, names)


def build_tiny(folder: Path, seed: int = 0, **config: Any) -> None:
    """Writes the tiny model and its tokenizer."""
    build(tiny_recipe(**config), folder, seed)


def tiny_rows(kind: str, size: int = ROWS) -> list[dict[str, Any]]:
    """Rows of a kind (`demonstration`, `comparison`, `ranking`, `judgement`) as JSON: counting beats repeating."""
    return [_tiny_row(kind, i % 7, 2 + i % 4, i % 2 == 0) for i in range(size)]


def _tiny_row(kind: str, start: int, count: int, desirable: bool) -> dict[str, Any]:
    prompt = {"prompt": f"count from {start}: "}
    good, bad = (" ".join(map(str, items)) for items in (range(start, start + count), [start] * count))
    if kind == "demonstration":
        return {**prompt, "completion": good}
    if kind == "comparison":
        return {**prompt, "chosen": good, "rejected": bad, "margin": count / 2}
    if kind == "ranking":
        ranks = [1, 0, 2] if desirable else [1, 0, 1]
        scores = [3.0 - rank for rank in ranks]
        return {**prompt, "completions": [bad, good, bad + "!"], "ranks": ranks, "scores": scores}
    return {**prompt, "completion": good if desirable else bad, "label": desirable}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def tiny_config(
    model: Path, folder: Path, sections: Mapping[str, Any], plugins: Plugins, own: Algorithm | None = None
) -> RunConfig:
    """A run of the tiny model on rows its algorithm can eat; `sections` are laid over the defaults. `own` is an
    algorithm that need not be installed."""
    algorithm = sections.get("algorithm", {"name": "sft"})
    found = plugins.find("algorithm", algorithm["name"]) if own is None else type(own)
    eats = found.eats.kind  # type: ignore[attr-defined]
    data = write_rows(folder.parent / f"{eats}.jsonl", tiny_rows(eats))
    defaults = {
        "prefopt": 1,
        "model": {"path": str(model)},
        "data": {"source": "jsonl", "path": str(data)},
        "algorithm": algorithm,
        "optim": {"lr": 1e-2, "batch_size": 8, "schedule": "cosine", "warmup": 0.1},
        "run": {"dir": str(folder), "steps": 4, "device": "cpu", "threads": 1, "checkpoint": {"every": 2}},
    }
    config = run_from(Document(defaults).merged(Document(dict(sections))), plugins.find)
    return config if own is None else config.model_copy(update={"algorithm": own})


def train_on(model: Path, folder: Path, sections: Mapping[str, Any], resume: bool = False) -> Result:
    """Trains the tiny model as `tiny_config` says, without a display."""
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    return train(tiny_config(model, folder, sections, plugins), plugins, resume=resume)
