"""Sampling: prefopt's continuous batching and transformers' `generate` as TRL calls it, with one model and prompts.

    python benchmarks/rollout.py WORKLOAD OUT.json [--prompts 8] [--samples 8] [--slots 128] [--blocks 3]
        [--device cuda | --vllm PYTHON [--eager]]

WORKLOAD is made by `compare/workload.py`. `generate` gets n copies of every prompt, padded on the left, and goes on
until the longest completion ends. Greedy texts of both sides are compared first and must be equal. Then they draw in
turn, each in a process of its own; all are in memory at once. *uneven*: an untrained model hardly ever ends by itself,
so a constant is added to the end's logit that makes MEAN tokens the mean length, a geometric distribution cut at
LONGEST; the other side continues the same prompts to the lengths that ours had drawn.
*equal*: no completion ends before EQUAL tokens. What counts are tokens of completions, with their end,
without padding, by the clock and by the processor time of the process, which a busy machine disturbs less. Where all
rows fit into the slots, every step reads every weight once: how many GB a second of them, at least, is told beside what
copies move. With `--vllm` the other side is its CPU build, which tells the log-probability of each token, as ours
always does; OUT keeps the rest. Ours takes part twice,
as it is and with `rollout.compile`; vLLM compiled, as by default, and with `--eager` eager, too. Before the clock runs
every side draws everything twice, as in a run that draws step after step: then all is compiled, and memory is there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

MEAN, LONGEST, EQUAL, GREEDY = 32, 128, 48, 32
PROMPT = 192
SIZES = {"prompts": 8, "samples": 8, "slots": 128, "threads": 2}
CLOCKS = ("seconds", "cpu_seconds")
COPIED, COPIES = 1 << 28, 8
"""Bytes moved to see how fast memory is, and how often."""
SIDES = ("prefopt", "generate")
COMPILED, EAGER = "prefopt compiled", "vLLM eager"
OURS, THEIRS = ("prefopt", COMPILED), ("vLLM", EAGER)
KINDS = ("uneven", "equal")
BEFORE = 2
"""Drawings of each side before the clock runs."""
Prompts = list[tuple[int, ...]]


def read_prompts(workload: Path, count: int, samples: int) -> Prompts:
    """Random prompts of at most PROMPT tokens, each `samples` times."""
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(workload / "model")
    rows = [json.loads(line)["prompt"] for line in (workload / "pairs.jsonl").read_text("utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    ids = (tuple(reader(text)["input_ids"]) for text in rows)
    fitting = [prompt for prompt, _ in zip((i for i in ids if len(i) <= PROMPT), range(count), strict=False)]
    return [prompt for prompt in fitting for _ in range(samples)]


@torch.no_grad()
def lean_to_the_end(network: Any, prompts: Prompts, mean: float | None) -> None:
    """Adds to the end's logit what makes its probability 1 / mean behind the prompts; without a mean it never comes."""
    end, shift = network.config.eos_token_id, -1e4
    if mean is not None:
        ids = (torch.tensor([prompt], device=network.device) for prompt in dict.fromkeys(prompts))
        last = torch.stack([network(each).logits[0, -1] for each in ids])
        rest = torch.cat([last[:, :end], last[:, end + 1 :]], dim=1).logsumexp(1)
        shift = float((rest - last[:, end]).mean() - torch.log(torch.tensor(mean - 1)))

    def hook(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., end] += shift
        return logits

    network.get_output_embeddings().register_forward_hook(hook)


def generate(model: Any, prompts: Prompts, most: int, lengths: Sequence[int] | None) -> list[list[int]]:
    """Rows of these lengths, drawn; without lengths greedy ones of up to `most` tokens, to their ends."""
    from transformers import GenerationConfig, StoppingCriteriaList

    network, (end,) = model.network, model.end_ids
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(0)
    ids, mask = ids.to(model.device), mask.to(model.device)
    drawn, until = lengths is not None, torch.tensor(lengths or [most] * len(prompts), device=model.device)
    done = StoppingCriteriaList([lambda row_ids, scores, **more: row_ids.shape[1] - width >= until])
    config = GenerationConfig(
        max_new_tokens=most, do_sample=drawn, top_k=0, eos_token_id=end, pad_token_id=0, disable_compile=True
    )
    out = network.generate(input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=done)
    rows = [row[:n] for row, n in zip(out[:, width:].tolist(), until.tolist(), strict=True)]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def continuous(model: Any, prompts: Prompts, most: int, greedy: bool, slots: int) -> list[list[int]]:
    from prefopt.api import Request
    from prefopt.builtin.continuous import Continuous

    drawer = Continuous(max_new_tokens=most, slots=slots, greedy=greedy).open(model)
    found = dict(drawer([Request(prompt, i) for i, prompt in enumerate(prompts)]))
    return [list(found[i].ids or ()) for i in range(len(prompts))]


def work(options: argparse.Namespace) -> None:
    """One side: draws when told to, and says what it took."""
    from prefopt.engine.compiled import Compiled
    from prefopt.engine.models import open_model
    from prefopt.engine.ranks import Ranks

    side, kind = options.work
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    copied = copy_rate(device)
    if side in OURS:
        Ranks(options.device, options.threads)  # a run begins with it, and keeps what is freed from then on
    model: Any = replace(open_model(str(options.workload / "model"), device), compiled=side == COMPILED)
    greedy = kind == "greedy"
    prompts = read_prompts(options.workload, options.prompts, 1 if greedy else options.samples)
    lean_to_the_end(model.network, prompts, MEAN if kind == "uneven" and side in OURS else None)
    most = {"greedy": GREEDY, "uneven": LONGEST, "equal": EQUAL}[kind]
    began = time.perf_counter()
    if side in OURS:
        continuous(model, prompts[:2], 2, greedy, options.slots)
    else:
        generate(model, prompts[:2], 2, None)
    if side == COMPILED and not Compiled.knows(model.network):
        raise SystemExit("the steps are not compiled")
    answer(ready_seconds=time.perf_counter() - began, copy_gb_per_second=copied)
    weights = sum(p.numel() * p.element_size() for p in model.network.parameters())
    for line in sys.stdin:
        lengths = (json.loads(line) or {}).get("lengths")
        began, busy = time.perf_counter(), time.process_time()
        if side in OURS:
            texts = continuous(model, prompts, most, greedy, options.slots)
        else:
            texts = generate(model, prompts, most, lengths)
        found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
        found |= {"tokens": sum(map(len, texts)), "longest": max(map(len, texts)), "peak_mb": peak_mb(device)}
        if len(prompts) <= options.slots:
            found |= {"weights_gb_per_second": weights * found["longest"] / found["seconds"] / 1e9}
        drawn = {"texts": texts} if greedy else {"prompts": prompts, "lengths": [len(text) for text in texts]}
        answer(**found, drawn=drawn)


def answer(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def peak_mb(device: torch.device) -> float:
    """The most memory so far: of a GPU its own, with what PyTorch keeps for later."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def copy_rate(device: torch.device) -> float:
    """GB a second that copies read and write together, the best of several."""
    source, target = torch.zeros(2, COPIED, dtype=torch.uint8, device=device)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        int(target[0])  # waits for the device
        taken.append(time.perf_counter() - began)
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return 2 * COPIED * COPIES / min(taken) / 1e9


class Side:
    """A process that draws when told to."""

    def __init__(self, options: argparse.Namespace, name: str, kind: str) -> None:
        environment = {
            "OMP_NUM_THREADS": str(options.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = _vllm(options, name) if name in THEIRS else _own(options, name, kind)
        self.name = name
        self.process = subprocess.Popen(command, text=True, env={**os.environ, **environment}, **pipes)  # type: ignore[call-overload]

    def __enter__(self) -> Side:
        self.ready = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def draw(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """What a drawing takes; other sides continue prompts to the lengths of one that is told."""
        with suppress(BrokenPipeError):  # then there is no answer
            self.process.stdin.write(json.dumps(None if self.name in OURS else drawn) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise SystemExit(f"{self.name} ended without an answer")


def _own(options: argparse.Namespace, name: str, kind: str) -> list[str]:
    sizes = [f"--{size}={getattr(options, size)}" for size in (*SIZES, "device")]
    return [sys.executable, __file__, str(options.workload), str(options.out), *sizes, "--work", name, kind]


def _vllm(options: argparse.Namespace, name: str) -> list[str]:
    prompts, script = read_prompts(options.workload, options.prompts, 1), Path(__file__).with_name("rollout_vllm.py")
    longest = max(map(len, prompts)) + max(LONGEST, EQUAL) + 1
    command = [str(options.vllm), str(script), str(options.workload / "model"), str(longest)]
    return command + (["eager"] if name == EAGER else [])


def in_turn(options: argparse.Namespace, kind: str, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What drawings of sides take, one after the other, those before the clock runs left out. The first is ours."""
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(options, name, kind)) for name in names]
        drawn: dict[str, Any] = {}
        for turn in range(BEFORE + options.blocks):
            first = turn % len(sides)
            for side in (*sides[first:], *sides[:first]):
                found = side.draw(drawn)
                told = found.pop("drawn", drawn)
                drawn = told if side.name in OURS else drawn
                if turn >= BEFORE:
                    blocks[side.name].append(found | side.ready)
                    rates = [found["tokens"] / found[clock] for clock in CLOCKS]
                    print(f"{kind} {side.name}: {rates[0]:.0f} tokens/s, {rates[1]:.0f} by CPU time", flush=True)
    return blocks


def against_generate(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Equality first."""
    texts = []
    for name in SIDES:
        with Side(options, name, "greedy") as side:
            texts.append(side.draw({})["drawn"]["texts"])
    if texts[0] != texts[1]:
        raise SystemExit("the greedy texts of both sides differ")
    return {kind: compared(in_turn(options, kind, SIDES)) for kind in KINDS}


def against_vllm(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    others = THEIRS if options.eager else THEIRS[:1]
    found = {}
    for kind in KINDS:
        blocks = in_turn(options, kind, (*OURS, *others))
        for ours, theirs in product(OURS, others):
            found[f"{kind}, {ours}, {theirs}"] = compared({side: blocks[side] for side in (ours, theirs)})
    return found


def compared(blocks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each side, and the ratios of ours to the other's."""
    ours, other = blocks
    found: dict[str, Any] = {"peak_mb": {side: median(b["peak_mb"] for b in blocks[side]) for side in blocks}}
    for clock in CLOCKS:
        rates = {side: [b["tokens"] / b[clock] for b in blocks[side]] for side in blocks}
        ratios = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
        middle = {side: median(rates[side]) for side in blocks}
        found[f"tokens_by_{clock}"] = {**middle, "ratio": median(ratios), "ratios": ratios}
    return {**found, "blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (SIZES | {"blocks": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--vllm", type=Path, help="the interpreter of an environment with vLLM")
    parser.add_argument("--eager", action="store_true", help="vLLM without its compiler, too")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    if options.vllm and options.device != "cpu":
        parser.error("--vllm is its CPU build: leave --device out")
    if options.eager and not options.vllm:
        parser.error("--eager is for --vllm")
    from prefopt.bench.report import short_commit

    settings = {"mean": MEAN, "longest": LONGEST, "equal": EQUAL, "before": BEFORE}
    settings |= {"blocks": options.blocks, "commit": short_commit()}
    settings |= {name: getattr(options, name) for name in (*SIZES, "device")} | {"torch": torch.__version__}
    found = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    if options.vllm:
        settings["cache_gb"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        found["against_vllm"] = {"settings": settings, **against_vllm(options)}
    else:
        found |= {"settings": settings, **against_generate(options)}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
