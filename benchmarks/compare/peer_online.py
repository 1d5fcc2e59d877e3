"""TRL's trainers of methods that sample: its dialect of our settings, an end that never comes, the other side's draws.

Knows nothing of blocks and steps: see `peer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from reward import letters
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker import BETA, SAMPLES, TOKENS


def online(path: Path, method: str, common: dict[str, Any], data: Dataset, callback: Any) -> Any:
    """GRPO or RLOO with TRL's own defaults; an update for each draw. Where completions are of one length and KL costs
    nothing, its default loss, `dapo`, is the published one."""
    import trl

    make, config = (trl.GRPOTrainer, trl.GRPOConfig) if method == "grpo" else (trl.RLOOTrainer, trl.RLOOConfig)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    never = [model.config.vocab_size]
    settings = {
        "num_generations": SAMPLES,
        "max_completion_length": TOKENS,
        "beta": BETA[method],
        "shuffle_dataset": False,
        "generation_kwargs": {"eos_token_id": never},
    }
    reader = AutoTokenizer.from_pretrained(path)
    args = config(**common, **settings)
    run = make(model, [reward], args=args, train_dataset=data, processing_class=reader, callbacks=[callback])
    run.eos_token_ids = never
    return run


def reward(prompts: list[str], completions: list[str], **others: Any) -> list[float]:
    return letters(prompts, completions, others)


def replay(run: Any, method: str, journal: Path, reference: Path) -> None:
    """The steps of `journal` instead of draws, and a reference, if one is needed, other than the policy."""
    if run.ref_model is not None:
        run.ref_model.load_state_dict(AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).state_dict())
    steps = recorded(journal)

    def draw(*args: Any, **kwargs: Any) -> Any:
        ids = next(steps)
        return (ids, None) if method == "grpo" else ids  # None: it shall compute log-probabilities itself

    run._generate_single_turn = draw


def recorded(journal: Path) -> Iterator[list[list[int]]]:
    """The completions of each step, prompt by prompt."""
    for path in sorted(journal.glob("*.json")):
        groups = json.loads(path.read_text("utf-8"))["rollouts"]
        yield [completion["ids"] for group in groups for completion in group["completions"]]
