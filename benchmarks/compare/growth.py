"""How time and memory grow, on pairs of exact lengths: with length, vocabulary, batch, and with the prompt beside TRL.

    python benchmarks/compare/growth.py WORKLOAD PEER_PYTHON OUT.json [length | vocabulary | batch | prompt ...]

Seconds are those of a step and of the reference's pass over its rows, the median of all steps but the first; with the
vocabulary those of a step alone, the same one several times after one to warm up. Texts are random words that are one
token each, models random. Exponents are slopes of log against log by least squares. Memory with the vocabulary is the
most that tensors take in a step beyond weights, gradients and the moments of AdamW, counted allocation by allocation as
the profiler tells them.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from itertools import accumulate
from math import log
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from compare import Side, ours, peer
from ours import build
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from worker import roof

from prefopt.bench.report import short_commit
from prefopt.engine.loop import Loop

STEPS = 3
LENGTHS = (128, 256, 512, 960)
VOCABULARIES = (16_000, 32_000, 64_000, 128_000)
BATCHES = (1, 2, 4, 8, 16, 32)
PROMPTS = (64, 256, 512, 896)
HEADS: dict[str, list[str]] = {
    "default": [],
    "256 MB": [f"optim.head_bytes={256 << 20}"],
    "nothing kept": ["optim.head_bytes=0"],
}
TIMED = 3


def workload(source: Path, out: Path, prompt: int, completion: int, vocabulary: int = 32_000, batch: int = 8) -> Path:
    """Pairs of `prompt` and twice `completion` tokens (with its end) and a random model of `vocabulary` words."""
    reader = AutoTokenizer.from_pretrained(source / "model")
    words = [w[1:] for w in reader.get_vocab() if w[0] == "Ġ" and w[1:].isalpha() and w[1:].isascii()]
    draw = random.Random(0)

    def text(size: int) -> str:
        return "".join(f" {word}" for word in draw.choices(words, k=size))

    rows = [
        {"prompt": text(prompt), "chosen": text(completion - 1), "rejected": text(completion - 1)}
        for _ in range(batch * STEPS)
    ]
    assert all(len(reader(row["prompt"] + row["chosen"])["input_ids"]) == prompt + completion - 1 for row in rows)
    out.mkdir(parents=True)
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source / "model", vocab_size=vocabulary)
    AutoModelForCausalLM.from_config(config).save_pretrained(out / "model")
    reader.save_pretrained(out / "model")
    return out


def measure(side: Side) -> dict[str, float]:
    """Seconds of a step, the median of all but the first, and the most memory that the process had, in MB."""
    with side:
        seconds = side.train(STEPS)
    return {"seconds": median(seconds[1:]), "peak_mb": side.peak_mb}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    return linear_regression([*map(log, x)], [*map(log, y)]).slope


def lengths(source: Path, folder: Path) -> dict[str, Any]:
    """With length, prefopt alone."""
    by_length = {n: measure(ours(workload(source, folder / f"l{n}", n // 2, n // 2), "dpo", STEPS)) for n in LENGTHS}
    exponents = exponent(LENGTHS, [f["seconds"] for f in by_length.values()])
    return {"tokens": by_length, "time_exponent": exponents}


def vocabularies(source: Path, folder: Path) -> dict[str, Any]:
    """With the vocabulary, prefopt alone, by what the head may keep for its backward pass; steps in turn."""
    seconds: dict[str, dict[int, float]] = {name: {} for name in HEADS}
    memory: dict[str, dict[int, float]] = {name: {} for name in HEADS}
    for size in VOCABULARIES:
        made = workload(source, folder / f"v{size}", 128, 64, size)
        loops = {
            name: build(made, "dpo", STEPS, Path(tempfile.mkdtemp(dir=folder)), more) for name, more in HEADS.items()
        }
        rounds = [{name: _seconds(loop, 1) for name, loop in loops.items()} for _ in range(1 + TIMED)][1:]
        for name, loop in loops.items():
            seconds[name][size] = median(taken[name] for taken in rounds)
            memory[name][size] = _most_mb(loop, 2)
        del loops, loop
        gc.collect()  # before the next: nothing of these may be freed while those are counted
    exponents = {name: exponent(VOCABULARIES, [*by_size.values()]) for name, by_size in memory.items()}
    return {"mb": memory, "memory_exponent": exponents, "seconds": seconds}


def _seconds(loop: Loop, step: int) -> float:
    began = time.perf_counter()
    loop.step(step)
    return time.perf_counter() - began


def _most_mb(loop: Loop, step: int) -> float:
    """The most that tensors take in a step, in MB, beyond weights, moments and gradients; those that do not last from
    step to step are all there when the last of several micro-batches begins."""
    assert len(loop.forwarder.plan(loop.assembler(loop.order.step(step)))) > 1
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loop.step(step)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiled.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text("utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    most = max(accumulate(change for _, change in sorted(changes)))
    optimizer = loop.optimizer
    gradients = sum(p.nbytes for p in optimizer.named.values() if id(p) not in optimizer.lasting)
    return (most - gradients) / 2**20


def batches(source: Path, folder: Path) -> dict[str, Any]:
    """With the pairs of a step, prefopt alone."""
    found = {}
    for size in BATCHES:
        made = workload(source, folder / f"b{size}", 128, 64, batch=size)
        found[size] = measure(ours(made, "dpo", STEPS, f"optim.batch_size={size}"))
    return {"pairs": found, "time_exponent": exponent(BATCHES, [f["seconds"] for f in found.values()])}


def prompts(source: Path, folder: Path, python: str) -> dict[str, Any]:
    """With the prompt, completions of 64 tokens: prefopt and TRL one row at a time."""
    found: dict[str, dict[int, float]] = {"prefopt": {}, "TRL": {}}
    for n in PROMPTS:
        made = workload(source, folder / f"p{n}", n, 64)
        sides = {"prefopt": ours(made, "dpo", STEPS), "TRL": peer(python, made, "dpo", STEPS, 1, "best")}
        for name, side in sides.items():
            found[name][n] = measure(side)["seconds"]
    slopes = {name: linear_regression(PROMPTS, [*seconds.values()]).slope for name, seconds in found.items()}
    return {"seconds": found, "seconds_for_each_token": slopes, "times_slower": slopes["TRL"] / slopes["prefopt"]}


def main() -> None:
    source, python, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    parts = {"length": lengths, "vocabulary": vocabularies, "batch": batches, "prompt": partial(prompts, python=python)}
    found: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[4:] or parts:
            made = {"commit": short_commit(), "date": date.today().isoformat(), "roof_gflops": roof()}
            found[name] = made | parts[name](source, Path(folder))
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
