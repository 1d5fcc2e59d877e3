"""Records the losses of TRL's DPO trainer on a tiny model: `trl_dpo/losses.json`, which `test_trl.py` compares with.

Run it in an environment of its own with `torch==2.13.0 trl==1.16.0`, from a folder that has no Python package in it:

    python path/to/tests/golden/record_trl.py path/to/tests/golden/trl_dpo

The folder must hold `model/`; `python tests/golden/make_tiny.py tests/golden/trl_dpo/model` writes it.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

BETA, BATCH, STEPS, RATE = 0.1, 4, 8, 5e-3


def rows() -> list[dict[str, str]]:
    """Words of different lengths, so that every batch is padded."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 6))) for _ in range(count))

    return [
        {
            "prompt": words(draw.randint(1, 4)) + ":",
            "chosen": " " + words(draw.randint(1, 4)),
            "rejected": " " + words(2),
        }
        for _ in range(BATCH * STEPS)
    ]


def main(folder: Path) -> None:
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    losses: list[float] = []

    class Recording(DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            losses.append(float(result[0] if isinstance(result, tuple) else result))
            return result

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=BETA,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Recording(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows()),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    record = {
        "peer": f"trl {trl.__version__}, torch {torch.__version__}",
        "settings": {"beta": BETA, "batch": BATCH, "lr": RATE, "steps": STEPS, "schedule": "constant", "clip": 1.0},
        "rows": rows(),
        "losses": losses,
    }
    (folder / "losses.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
