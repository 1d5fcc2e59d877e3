"""Records what TRL's trainers compute for one batch, with the token log-probabilities it was computed from:
`trl_losses.json`, which `test_losses.py` compares with.

Run it in an environment of its own with `torch==2.13.0 trl==1.16.0`, from a folder that has no Python package in it:

    python path/to/tests/golden/record_losses.py path/to/tests/golden
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS = 6
SIDES = ("chosen", "rejected")
COMMON = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
COMMON |= {"disable_tqdm": True, "seed": 0, "per_device_train_batch_size": ROWS}

RPO = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
DPO: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid"]},
    "dpo beta=0.5": {"loss_type": ["sigmoid"], "beta": 0.5},
    "robust_dpo": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "dpo_norm": {"loss_type": ["sigmoid_norm"], "beta": 5.0},
    "f_dpo": {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "f_dpo divergence=forward_kl": {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
    "f_dpo divergence=alpha": {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence"},
    "ld_dpo": {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
    "wpo": {"loss_type": ["sigmoid"], "use_weighting": True},
    "rpo nll=tokens": RPO,
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    # what is different there: `tests/golden/test_losses.py` says why
    "cdpo, ignored": {"loss_type": ["sigmoid"], "label_smoothing": 0.1},
}
AOT: dict[str, dict[str, Any]] = {
    "aot": {"loss_type": ["aot"]},
    "aot label_smoothing=0.2": {"loss_type": ["aot"], "label_smoothing": 0.2},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
}
CPO: dict[str, dict[str, Any]] = {
    "cpo": {"loss_type": "sigmoid", "cpo_alpha": 1.0, "beta": 0.1},
    "cpo alpha=0": {"loss_type": "sigmoid", "cpo_alpha": 0.0, "beta": 0.1},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
    "cpo_simpo": {"loss_type": "simpo", "cpo_alpha": 1.0, "beta": 2.0, "simpo_gamma": 0.5},
    "alphapo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5, "alpha": 0.25},
    "simpo, by default": {"loss_type": "simpo"},
}
KTO: dict[str, dict[str, Any]] = {
    "kto": {"loss_type": "kto"},
    "kto desirable_weight=1.2 undesirable_weight=0.9": {"desirable_weight": 1.2, "undesirable_weight": 0.9},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 6))) for _ in range(count))


def rows() -> list[dict[str, str]]:
    """Pairs of different lengths."""
    draw = random.Random(0)
    return [
        {
            "prompt": words(draw, draw.randint(1, 4)) + ":",
            "chosen": " " + words(draw, draw.randint(1, 4)),
            "rejected": " " + words(draw, draw.randint(1, 4)),
        }
        for _ in range(ROWS)
    ]


def crossed() -> list[dict[str, str]]:
    """Pairs of sides of one length: where length says nothing, policy and reference have margins in another order."""
    draw = random.Random(0)
    return [
        {"prompt": words(draw, 2) + ":", **{side: " " + "".join(draw.choices("abcdefgh", k=8)) for side in SIDES}}
        for _ in range(ROWS)
    ]


def judged() -> list[dict[str, Any]]:
    """Replies of which two thirds are good."""
    return [
        {"prompt": r["prompt"], "completion": r["chosen" if i % 3 else "rejected"], "label": i % 3 != 0}
        for i, r in enumerate(rows())
    ]


def models(folder: Path) -> tuple[Any, Any]:
    """The policy, and a reference a little way from it."""
    import torch
    from transformers import AutoModelForCausalLM

    found = [AutoModelForCausalLM.from_pretrained(folder / "trl_dpo/model", dtype=torch.float32) for _ in range(2)]
    torch.manual_seed(1)
    with torch.no_grad():
        for p in found[1].parameters():
            p.add_(0.05 * torch.randn_like(p))
    return found[0], found[1]


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "trl_dpo/model")


def measured(model: Any, ids: Any, mask: Any) -> Any:
    """What one model says of each trained token: log-probabilities, and `-log Σ p²`."""
    import torch

    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), -1)
    own = logps.gather(2, ids[:, 1:, None]).squeeze(2)
    collision = -torch.logsumexp(2 * logps, 2)
    kept = mask[:, 1:].bool()
    return tuple([row[k].tolist() for row, k in zip(x, kept, strict=True)] for x in (own, collision))


def trainer(cls: Any, settings: Any, folder: Path, data: list[dict[str, Any]], **more: Any) -> tuple[Any, Any]:
    """A trainer, and its first batch."""
    from datasets import Dataset

    arguments = settings(output_dir=tempfile.mkdtemp(), **{**COMMON, **more.pop("options", {})})
    made = cls(args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer(folder), **more)
    return made, next(iter(made.get_train_dataloader()))


def dpo(folder: Path) -> Iterator[tuple[str, Any]]:
    for name, options in DPO.items():
        made, batch = paired(folder, rows(), options)
        if name == "dpo":
            yield "pairs", sides(made, batch)
        yield name, made.compute_loss(made.model, batch).item()
    alone = [paired(folder, [row], RPO) for row in rows()]
    yield "rpo", sum(made.compute_loss(made.model, batch).item() for made, batch in alone) / ROWS


def aot(folder: Path) -> Iterator[tuple[str, Any]]:
    for name, options in AOT.items():
        made, batch = paired(folder, crossed(), options)
        if name == "aot":
            yield "crossed pairs", sides(made, batch)
        yield name, made.compute_loss(made.model, batch).item()


def paired(folder: Path, data: list[dict[str, str]], options: dict[str, Any]) -> tuple[Any, Any]:
    """DPO's trainer with these options, and its first batch."""
    from trl import DPOConfig, DPOTrainer

    policy, reference = models(folder)
    options = {"train_sampling_strategy": "sequential", **options}
    return trainer(DPOTrainer, DPOConfig, folder, data, model=policy, ref_model=reference, options=options)


def sides(made: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What policy and reference say of the pairs of a batch."""
    own, reference = (measured(m, batch["input_ids"], batch["completion_mask"]) for m in (made.model, made.ref_model))
    return {"logps": own[0], "collision": own[1], "reference": reference[0]}


def cpo(folder: Path) -> Iterator[tuple[str, Any]]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    for name, options in CPO.items():
        policy, _ = models(folder)
        made, batch = trainer(CPOTrainer, CPOConfig, folder, rows(), model=policy, options=options)
        if name == "cpo":
            yield "free pairs", whole(policy, batch)
        yield name, made.compute_loss(policy, batch).item()
    policy, _ = models(folder)
    made, batch = trainer(ORPOTrainer, ORPOConfig, folder, rows(), model=policy)
    loss, metrics = made.get_batch_loss_metrics(policy, batch)
    yield "orpo, whole sequence", loss.item()
    yield "orpo, odds", -made.args.beta * metrics["log_odds_ratio"]


def whole(policy: Any, batch: Any) -> dict[str, Any]:
    """The same of the CPO trainer's batch, which it draws in an order of its own."""
    found = []
    for side in SIDES:
        mask = batch[f"{side}_labels"] != -100
        found += measured(policy, batch[f"{side}_input_ids"], mask)[0]
    prompts = (batch["chosen_labels"] == -100) & (batch["chosen_attention_mask"] == 1)
    return {"logps": found, "prompts": measured(policy, batch["chosen_input_ids"], prompts)[0]}


def kto(folder: Path) -> Iterator[tuple[str, Any]]:
    from trl import KTOConfig, KTOTrainer

    for name, options in KTO.items():
        policy, reference = models(folder)
        options = {"train_sampling_strategy": "sequential", **options}
        made, batch = trainer(
            KTOTrainer, KTOConfig, folder, judged(), model=policy, ref_model=reference, options=options
        )
        if name == "kto":
            found = {"label": [bool(x) for x in batch["label"]]}
            for key, model in (("logps", policy), ("reference", reference)):
                found[key] = measured(model, batch["input_ids"], batch["completion_mask"])[0]
                found[f"probe_{key}"] = measured(model, batch["KL_input_ids"], batch["KL_completion_mask"])[0]
            yield "judgements", found
        yield name, made.compute_loss(policy, batch).item()


def dft(folder: Path) -> Iterator[tuple[str, Any]]:
    from trl import SFTConfig, SFTTrainer

    data = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows()]
    for name, options in {"dft": {"loss_type": "dft"}, "sft": {"loss_type": "nll"}}.items():
        policy, _ = models(folder)
        options = {"train_sampling_strategy": "sequential", **options}
        made, batch = trainer(SFTTrainer, SFTConfig, folder, data, model=policy, options=options)
        if name == "dft":
            yield "demonstrations", {"logps": measured(policy, batch["input_ids"], batch["labels"] != -100)[0]}
        yield name, made.compute_loss(policy, batch).item()


def main(folder: Path) -> None:
    import torch
    import trl

    record: dict[str, Any] = {"peer": f"trl {trl.__version__}, torch {torch.__version__}", "inputs": {}, "losses": {}}
    for part in (dpo, aot, cpo, kto, dft):
        for name, value in part(folder):
            record["losses" if isinstance(value, float) else "inputs"][name] = value
    (folder / "trl_losses.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
