"""TRL's side: `python peer.py WORKLOAD METHOD TOTAL_STEPS MICRO [best] [GRADIENTS] [KEY=VALUE...]`, see `worker.py`.

Run it in an environment of its own (`make_venv.sh`). MICRO is how many rows go through the model at once; `best` adds
what helps TRL on a CPU: precomputed reference log-probabilities and fused AdamW. Methods that sample take
`recorded=JOURNAL`, draws of the other side instead of their own, and `reference=MODEL`; all take `precision=bfloat16`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peer_online import online, replay
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from worker import BETA, PROMPTS, SAMPLES, Steps, answer, orders, peak_mb, roof, rows_of, versions

BATCH, MAX_LENGTH = 8, 2048


class ReferencePass:
    """TRL's own pass of the reference, again over the rows of some steps. Wraps what a trainer calls when made."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        self.compute = compute

    def first(self, trainer: Any, data: Dataset, name: str, rows: int) -> Dataset:
        """The trainer's, over all rows."""
        self.trainer, self.data, self.rows = trainer, data, rows
        return self.compute(trainer, data, name, rows)

    def seconds(self, steps: range) -> float:
        """For each of these steps; nothing where the reference goes over its rows in the step itself."""
        if not hasattr(self, "trainer"):
            return 0.0
        part = self.data.select(range(BATCH * steps.start, BATCH * steps.stop))
        began = time.perf_counter()
        self.compute(self.trainer, part, f"steps from {steps.start}", self.rows)
        return (time.perf_counter() - began) / len(steps)


class Blocks(TrainerCallback):  # type: ignore[misc]
    """Waits before each block for the order to train it, and answers after it."""

    def __init__(self, gradients: Path | None, reference: ReferencePass | None) -> None:
        self.gradients, self.waiting, self.left, self.steps = gradients, orders(), 0, Steps()
        self.reference = reference

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.left == 0:
            self.left, self.steps = next(self.waiting, 0), Steps()
            self.speed = roof()
            control.should_training_stop = self.left == 0
            if self.left == 0:
                answer(peak_mb=peak_mb())
                os._exit(0)
            if self.reference is not None:
                done = state.global_step
                self.steps.reference_seconds = self.reference.seconds(range(done, done + self.left))
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.gradients is not None and not self.gradients.exists():
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            save_file(found, self.gradients)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.seconds.append(time.perf_counter() - self.began)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self.steps.losses.append(float(logs["loss"]))
        self.steps.norms.append(float(logs["grad_norm"]))
        self.left -= 1
        if self.left == 0:
            answer(roof=self.speed, **asdict(self.steps))


def rows(workload: Path, method: str, count: int) -> Dataset:
    """The first pairs, in order, as the trainer of the method wants them."""
    name = rows_of(method)
    lines = (workload / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    found = [json.loads(line) for line in lines]
    if method == "sft":
        found = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in found]
    return Dataset.from_list(found)


def trainer(workload: Path, method: str, steps: int, micro: int, best: bool, callback: Blocks, half: bool) -> Any:
    batch = PROMPTS * SAMPLES if method in BETA else BATCH
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "use_cpu": True,
        "bf16": half,
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        **({"optim": "adamw_torch_fused"} if best else {}),
    }
    path = workload / "model"
    if method in BETA:
        return online(path, method, common, rows(workload, method, PROMPTS * steps), callback)
    common |= {"max_length": MAX_LENGTH, "train_sampling_strategy": "sequential"}
    make: Any
    config: Any
    if method == "reward_model":
        from trl import RewardConfig as config
        from trl import RewardTrainer as make

        path = workload / "classifier"
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if method == "dpo":
        from trl import DPOConfig as config
        from trl import DPOTrainer as make

        common |= {"beta": 0.1, "precompute_ref_log_probs": best}
    if method == "sft":
        from trl import SFTConfig as config
        from trl import SFTTrainer as make
    if method == "kto":
        from trl import KTOConfig as config
        from trl import KTOTrainer as make

        common |= {"beta": 0.1, "precompute_ref_log_probs": best}
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig as config
        from trl.experimental.orpo import ORPOTrainer as make

        common |= {"beta": 0.1}
    data = rows(workload, method, BATCH * steps)
    reader = AutoTokenizer.from_pretrained(path)
    if method == "orpo":
        reader.bos_token = None  # put before every prompt otherwise, which no other method here does
    return make(model, args=config(**common), train_dataset=data, processing_class=reader, callbacks=[callback])


def main() -> None:
    workload, method, steps, micro = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    gradients = next((Path(a) for a in sys.argv[5:] if a != "best" and "=" not in a), None)
    given = dict(a.split("=", 1) for a in sys.argv[5:] if "=" in a)
    reference = None
    if method in ("dpo", "kto"):
        import trl

        owner = trl.DPOTrainer if method == "dpo" else trl.KTOTrainer
        reference = ReferencePass(owner._precompute_ref_logps)
        owner._precompute_ref_logps = lambda *args: reference.first(*args)
    half = given.pop("precision", "float32") == "bfloat16"
    run = trainer(workload, method, steps, micro, "best" in sys.argv[5:], Blocks(gradients, reference), half)
    if given:
        replay(run, method, Path(given["recorded"]), Path(given["reference"]))
    answer(ready=True, versions=versions())
    run.train()
    answer(peak_mb=peak_mb())


if __name__ == "__main__":
    sys.stdout = sys.stderr  # answers alone go to the real standard output
    main()
