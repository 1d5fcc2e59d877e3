"""prefopt and TRL side by side: equality first, then interleaved blocks of steps on the same pairs.

    python benchmarks/compare/compare.py WORKLOAD PEER_PYTHON OUT.json [--methods dpo,sft] [--blocks 5] [--rows 1,2,4,8]
        [--precision bfloat16] [--once]

WORKLOAD is made by `workload.py`, PEER_PYTHON is the interpreter of the environment made by `make_venv.sh`. TRL runs
in its default layout (the whole step in one forward pass) and at its best: the fastest of several numbers of rows at a
time (of those that it accepts) with precomputed reference and fused AdamW. Seconds are medians over the
blocks; where the reference is scored before training, its pass over the rows of a block is timed before the block, with
what each side does it with. How many times longer the other takes is the median over the blocks, in each of which both
sides run within minutes of each other. OUT keeps what it has of other methods.

A step of grpo and rloo draws 8 completions of 64 tokens for each of 4 prompts, scores them and makes one update. What
our side draws is given to the other for the comparison of losses and gradients, and where KL costs something both get a
random model for the reference, so that it counts from the first step on; in the blocks each draws for itself. Our side
takes part twice, as it is and with `rollout.reuse_bytes` and `rollout.compile`, compiled before the first block.

`--once` is for what takes minutes a step, and learns from rows: the first step alone, of ours and of TRL at its best
with the rows named, one after the other, warming up included; of gradients, only the norms are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean, median, quantiles, stdev
from typing import Any

from worker import BETA, PROMPTS, SAMPLES, TOKENS

from prefopt.bench.report import short_commit

HERE = Path(__file__).parent
STEPS = 2
MICRO = (1, 2, 4, 8)
MICRO_ONLINE = (2, 4, 8, 16, 32)
REFUSED = {"kto": (1,)}
"""Rows at a time with which TRL ends in an error: its z needs another row of the microbatch."""
PREPARED = "prefopt, drawing compiled and reused"
OPTIONS = ("rollout.reuse_bytes=2000000000", "rollout.compile=true")
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 5e-2)}
"""How far losses and gradients may differ."""


@dataclass
class Side:
    """A process that trains when told to."""

    name: str
    command: list[str]
    seconds: list[float] = field(default_factory=list)
    references: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    roofs: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    def __enter__(self) -> Side:
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [environment.get("PYTHONPATH")])])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
        self.ready = self._answer()
        if not self.ready.get("fast", True):
            raise SystemExit(f"{self.name} does not take its fastest path with this model: {' '.join(self.command)}")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.peak_mb = self._answer()["peak_mb"]
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise SystemExit(f"{self.name} ended without an answer: {' '.join(self.command)}")

    def train(self, steps: int, count: bool = True) -> list[float]:
        """Trains a block; returns the seconds of its steps, their share of the reference's pass included."""
        self.process.stdin.write(f"steps {steps}\n")
        self.process.stdin.flush()
        found = self._answer()
        self.losses += found["losses"]
        self.norms += found["norms"]
        if self.name == PREPARED and not (found["compiled"] and min(found["reused"]) == 1):
            raise SystemExit(f"{self.name}: not compiled, or only {min(found['reused']):.0%} were looked up")
        whole = [seconds + found["reference_seconds"] for seconds in found["seconds"]]
        if count:
            self.seconds += found["seconds"]
            self.references.append(found["reference_seconds"])
            self.blocks.append(median(whole))
            self.roofs.append(found["roof"])
        return whole

    def summary(self) -> dict[str, Any]:
        low, _, high = quantiles(self.seconds, n=4)
        return {
            "step_seconds": median(self.seconds),
            "quartiles": [low, high],
            "reference_seconds": median(self.references),
            "seconds": median(self.blocks),
            "blocks": self.blocks,
            "roofs": self.roofs,
            "peak_mb": self.peak_mb,
            "roof_gflops": median(self.roofs),
        }


def ours(workload: Path, method: str, steps: int, *more: str) -> Side:
    return Side(
        PREPARED if {*OPTIONS} <= {*more} else "prefopt",
        [sys.executable, str(HERE / "ours.py"), str(workload), method, str(steps), *more],
    )


def peer(python: str, workload: Path, method: str, steps: int, micro: int, *more: str) -> Side:
    command = [python, str(HERE / "peer.py"), str(workload), method, str(steps), str(micro), *more]
    return Side(f"TRL, {micro} rows at a time{', best settings' if 'best' in more else ''}", command)


def prepares(method: str, precision: str) -> bool:
    """Whether our side takes part once more, with what makes drawing faster and keeps what it computed."""
    return method in BETA and precision == "float32"


def whole(method: str) -> int:
    """The rows of a step that TRL puts through the model at once unless told otherwise."""
    return PROMPTS * SAMPLES if method in BETA else max(MICRO)


def usual(method: str) -> Sequence[int]:
    """Rows at a time to try unless others are named."""
    return MICRO_ONLINE if method in BETA else MICRO


def same_reference(workload: Path, method: str, folder: Path) -> tuple[list[str], list[str]]:
    """What gives both sides the same reference, a random model other than the policy.

    The seed is one with which no padding token is drawn: where one is, the losses of the two sides differ by 1e-4.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(1)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workload / "model"))
    for part in (other, AutoTokenizer.from_pretrained(workload / "model")):
        part.save_pretrained(folder / "reference")
    mine = ["run.seed=1"]
    if BETA[method]:
        mine.append(f"reference.path={folder}/reference")
    return mine, [f"reference={folder}/reference"]


def spread(journal: Path, scaled: bool) -> float:
    """How far scores lie from the mean of their group: the size of the terms of the loss, which add up to 0."""
    groups = [g for path in journal.glob("*.json") for g in json.loads(path.read_text("utf-8"))["rollouts"]]
    scores = [[c["score"] for c in group["completions"]] for group in groups]
    return fmean(abs(x - fmean(own)) / (stdev(own) or 1 if scaled else 1) for own in scores for x in own)


def equality(python: str, workload: Path, method: str, precision: str) -> dict[str, float]:
    """Losses of two steps and gradients of the first, of ours in each way against TRL's, the largest differences. Ends
    the comparison when they differ."""
    found = [differences(python, workload, method, precision, ())]
    if prepares(method, precision):
        found.append(differences(python, workload, method, precision, OPTIONS))
    worst = {name: max(each[name] for each in found) for name in ("loss", "gradient")}
    loss, gradient = LIMITS[precision]
    if worst["loss"] > loss or worst["gradient"] > gradient:
        raise SystemExit(f"{method}: the sides do not compute the same: {found}")
    return {**worst, "tensors": min(each["tensors"] for each in found)}


def differences(python: str, workload: Path, method: str, precision: str, options: Sequence[str]) -> dict[str, float]:
    """Of our side with these options. What it draws, the other is given."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        journal = folder / "run" / "journal"
        mine, theirs = same_reference(workload, method, folder) if method in BETA else ([], [])
        mine = [*mine, f"run.dir={folder}/run", f"optim.precision={precision}", *options]
        theirs = [*theirs, f"recorded={journal}"] if method in BETA else []
        files = [str(folder / f"{name}.safetensors") for name in ("ours", "theirs")]
        sides = (
            ours(workload, method, 2, files[0], *mine),
            peer(python, workload, method, 2, whole(method), files[1], *theirs, f"precision={precision}"),
        )
        for side in sides:
            with side:
                side.train(2)
        unit = spread(journal, method == "grpo") if method in BETA else 0.0
        a, b = map(load_file, files)
        gradient, tensors = apart(a, b), len(a.keys() & b.keys())
    losses = [abs(x - y) / max(abs(y), unit) for x, y in zip(*(side.losses for side in sides), strict=True)]
    return {"loss": max(losses), "gradient": gradient, "tensors": tensors}


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """How far gradients are from others, in units of these."""
    names = sorted(a.keys() & b.keys())
    off = sum(float((a[n] - b[n]).double().square().sum()) for n in names) ** 0.5
    return off / sum(float(b[n].double().square().sum()) for n in names) ** 0.5


def tried(python: str, workload: Path, method: str, rows: Sequence[int], precision: str) -> dict[int, float]:
    """Seconds of a step of TRL by the rows at a time that it accepts: two steps after one to warm up."""
    seconds = {}
    for micro in (m for m in rows or usual(method) if m not in REFUSED.get(method, ())):
        with peer(python, workload, method, 3, micro, "best", f"precision={precision}") as side:
            side.train(1)
            seconds[micro] = median(side.train(2))
        print(f"  TRL {method}, {micro} rows at a time: {seconds[micro]:.2f} s a step", flush=True)
    return seconds


def needed_gflop(workload: Path, method: str, steps: Sequence[int]) -> float:
    """Mean useful work of a step: each token of a pair's row once, scored positions through the head, forward and
    backward, no recomputation; attention by visible pairs of places. KTO's mismatched replies go forward only; samples
    go forward once more to be drawn, and once to be scored by the reference where KL costs something."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(workload / "model")
    reader = AutoTokenizer.from_pretrained(workload / "model")
    file = workload / ("prompts.jsonl" if method in BETA else "pairs.jsonl")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    body, head = config.num_hidden_layers * layer, config.hidden_size * config.vocab_size
    width = config.num_hidden_layers * config.hidden_size

    def flop(prompt: int, sizes: Sequence[int], scored: int) -> float:
        seen = prompt**2 + sum(2 * prompt * size + size**2 for size in sizes)
        return 2 * body * (prompt + sum(sizes)) + 2 * width * seen + 2 * head * scored

    def work(i: int) -> float:
        row = rows[i]
        prompt = len(reader(row["prompt"])["input_ids"])
        if method in BETA:
            return (5 if BETA[method] else 4) * flop(prompt, [TOKENS] * SAMPLES, TOKENS * SAMPLES)
        sizes = {s: len(reader(row["prompt"] + row[s])["input_ids"]) + 1 - prompt for s in ("chosen", "rejected")}
        both = list(sizes.values())
        if method == "kto":
            own = both[i % 2]
            return 3 * flop(prompt, [own], own) + flop(0, [own], own)  # a mismatched reply is as long as its own row's
        used = both[:1] if method == "sft" else both
        scored = {"reward_model": 0, "orpo": prompt + sum(both)}.get(method, sum(used))
        return 3 * flop(prompt, used, scored)

    size = PROMPTS if method in BETA else 8
    return sum(work(size * step + i) for step in steps for i in range(size)) / len(steps) / 1e9


def compare(
    python: str, workload: Path, method: str, blocks: int, rows: Sequence[int], precision: str
) -> dict[str, Any]:
    print(f"{method}: equality", flush=True)
    equal = equality(python, workload, method, precision)
    searched = tried(python, workload, method, rows, precision)
    micro = min(searched, key=searched.__getitem__)
    total = STEPS * (blocks + 1)
    sides = [
        ours(workload, method, total, f"optim.precision={precision}"),
        peer(python, workload, method, total, whole(method), f"precision={precision}"),
        peer(python, workload, method, total, micro, "best", f"precision={precision}"),
    ]
    if prepares(method, precision):
        sides.append(ours(workload, method, total, f"optim.precision={precision}", *OPTIONS))
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(side)
            side.train(STEPS, count=False)
        for block in range(blocks):
            seconds = [median(side.train(STEPS)) for side in sides]
            print(f"  {method} block {block + 1}: {' | '.join(f'{s:.2f} s' for s in seconds)}", flush=True)
    found = {side.name: side.summary() for side in sides}
    mine = found["prefopt"]
    work = needed_gflop(workload, method, range(STEPS, total))
    for summary in found.values():
        summary["useful_mfu"] = work / summary["step_seconds"] / mine["roof_gflops"]
    by_block = slower(found, mine)
    peers = {"seconds_by_rows_at_a_time": searched, "refused_rows_at_a_time": REFUSED.get(method, ())}
    return {
        "date": date.today().isoformat(),
        "commit": short_commit(),
        "versions": {side.name: side.ready["versions"] for side in sides[:2]},
        "equality": equal,
        "needed_gflop": work,
        "sides": found,
        "times_slower_than_prefopt": {name: median(each) for name, each in by_block.items()},
        "times_slower_by_block": by_block,
        "times_slower_than_prepared": slower(found, found.get(PREPARED)),
        "search_for_the_best_of_trl": peers,
    }


def slower(found: dict[str, Any], mine: dict[str, Any] | None) -> dict[str, Any]:
    """How many times longer each side took than one of ours, by block."""
    blocks = [] if mine is None else mine["blocks"]
    return {
        name: [theirs / own for theirs, own in zip(summary["blocks"], blocks, strict=True)]
        for name, summary in (found.items() if blocks else ())
    }


def once(python: str, workload: Path, method: str, rows: int, precision: str) -> dict[str, Any]:
    """The first step of both sides."""
    sides = [
        ours(workload, method, 1, f"optim.precision={precision}"),
        peer(python, workload, method, 1, rows, "best", f"precision={precision}"),
    ]
    found = {}
    for side in sides:
        with side:
            seconds = side.train(1, count=False)[0]
        told = {"loss": side.losses[0], "gradient_norm": side.norms[0]}
        found[side.name] = {"seconds": seconds, **told, "peak_mb": side.peak_mb}
        print(f"{method:13s} {side.name:40s} {seconds:7.2f} s  {told}", flush=True)
    for limit, name in zip(LIMITS[precision], ("loss", "gradient_norm"), strict=True):
        mine, theirs = (side[name] for side in found.values())
        if abs(mine - theirs) > limit * abs(theirs):
            raise SystemExit(f"{method}: {name} of the two sides differs")
    return {"date": date.today().isoformat(), "commit": short_commit(), "first_step": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("python")
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default="dpo,sft,reward_model")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--rows", default="", help="rows at a time to try for TRL's best (default: several)")
    parser.add_argument("--precision", default="float32", choices=LIMITS)
    parser.add_argument("--once", action="store_true", help="the first step alone, with one number of rows")
    options = parser.parse_args()
    results = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    rows = [int(n) for n in options.rows.split(",") if n]
    methods = options.methods.split(",")
    if options.once and (len(rows) != 1 or any(m in BETA or rows[0] in REFUSED.get(m, ()) for m in methods)):
        parser.error("--once takes one number of --rows, which TRL accepts, and methods that do not sample")
    for method in methods:
        name = method if options.precision == "float32" else f"{method}, {options.precision}"
        if options.once:
            results[f"{name}, once"] = once(options.python, options.workload, method, rows[0], options.precision)
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            continue
        result = compare(options.python, options.workload, method, options.blocks, rows, options.precision)
        results[name] = result
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for name, found in result["sides"].items():
            times = result["times_slower_than_prefopt"][name]
            used = f"{found['seconds']:7.2f} s  {found['peak_mb']:7.0f} MB  MFU {found['useful_mfu']:.0%}"
            print(f"{method:13s} {name:40s} {used}  x{times:.2f}")


if __name__ == "__main__":
    main()
