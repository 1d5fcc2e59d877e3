"""How much of what can be gained on the world `bandit` each online method gains, exactly, and where GRPO as published
ends by its own equations. Writes `benchmarks/results/bandit.json`.

    python benchmarks/bandit.py [FOLDER] [STEPS]

FOLDER is where the runs are kept; what is there already is not run again.
"""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.bench.report import short_commit
from prefopt.bench.worlds.bandit import LETTERS, LONGEST, VOCABULARY, Exact, replies, worth
from prefopt.config import run_from
from prefopt.config.yaml import Document
from prefopt.engine.folder import write_text
from prefopt.plugins import load
from prefopt.session import train
from prefopt.stats import t_interval

RESULT = Path(__file__).parent / "results/bandit.json"
BETA = 0.5
SEEDS = range(5)
RATE, RATES = 1e-2, {"RLOO": 1e-3, "REINFORCE": 3e-3}
"""Learning rates; smaller where a reply's tokens are summed and not averaged, which makes updates larger."""
TIMES = {"RLOO": 2}
"""As many steps as others, times this."""
METHODS = {
    "PPO": {"name": "ppo", "beta": BETA, "decay": 1.0, "inner_epochs": 2, "truncated": "end"},
    "RLOO": {"name": "rloo", "beta": BETA},
    "REINFORCE": {"name": "reinforce", "beta": BETA},
    "GRPO, not scaled, KL in the reward": {"name": "grpo", "beta": BETA, "scale": "none", "kl_in": "reward"},
    "GRPO as published": {"name": "grpo", "beta": BETA},
}


def main(folder: str = "runs/bandit", steps: str = "100") -> None:
    jobs = [
        (label, seed, Path(folder) / f"{i}-{seed}", int(steps) * TIMES.get(label, 1))
        for i, label in enumerate(METHODS)
        for seed in SEEDS
    ]
    published = [Path(folder) / f"{len(METHODS) - 1}-{seed}" / "base" for seed in SEEDS]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(run, jobs))
        points = list(pool.map(fixed_point, published))
    figures = {label: [m for (name, *_), m in zip(jobs, found, strict=True) if name == label] for label in METHODS}
    figures["GRPO as published, by its equations"] = points
    told = {label: intervals(runs) for label, runs in figures.items()}
    for label, metrics in told.items():
        print(f"{label:36}", *(f"{key} {mean} [{low}, {high}]" for key, (mean, low, high) in metrics.items()))
    report = {"commit": short_commit(), "torch": torch.__version__, "beta": BETA, "steps": int(steps), "times": TIMES}
    report |= {"draws_per_step": 256, "seeds": len(SEEDS), "methods": told}
    write_text(RESULT, json.dumps(report, indent=1) + "\n")


def intervals(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean, low and high of each figure."""
    found = {key: t_interval([m[key] for m in runs]) for key in runs[0]}
    return {key: [round(x, 4) for x in (v.mean, v.low, v.high)] for key, v in found.items()}


def run(job: tuple[str, int, Path, int]) -> dict[str, float]:
    """The exact figures at the end of one run."""
    label, seed, folder, steps = job
    torch.set_num_threads(1)
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    if not (folder / "result.json").exists():
        train(run_from(Document(settings(label, seed, folder, steps)), plugins.find), plugins)
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "eval/gap_closed" in line][-1]
    return {key: last[f"eval/{key}"] for key in ("gap_closed", "exact_reward", "exact_kl", "kl_sequence")}


def settings(label: str, seed: int, folder: Path, steps: int) -> dict[str, object]:
    """The same for every method but for its own section and learning rate: 256 replies in each step."""
    held_out = {"source": "bandit", "size": 256}
    method = {**METHODS[label], "n": 8}
    return {
        "prefopt": 1,
        "model": {"path": "world:bandit"},
        "data": {"source": "bandit", "size": 64},
        "algorithm": method,
        "reward": {"name": "bandit_gold"},
        "sampler": {"name": "continuous", "max_new_tokens": LONGEST},
        "optim": {
            "lr": RATES.get(label, RATE),
            "batch_size": 32,
            "warmup": 0.05,
            "schedule": "linear",
            "max_grad_norm": None,
        },
        "eval": {"every": steps, "data": held_out, "rows": 256, "tasks": [{"name": "bandit_gap", "beta": BETA}, "kl"]},
        "run": {"dir": str(folder), "seed": seed, "steps": steps, "threads": 1, "device": "cpu"},
    }


# --- where GRPO ends ------------------------------------------------------------------------------------------------


def fixed_point(base: Path, steps: int = 200, groups: int = 500, n: int = 8) -> dict[str, float]:
    """Follows GRPO's expected update of equation 3, one update for each step, from the model at `base` in a table of
    logits, [prompt, prefix, token], until it stands still. The advantage that a reply can expect is a mean over
    `groups` draws of the n - 1 others; the KL term, k3 in the loss, is summed over all replies."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path, taken, length = _paths()
    rewards = torch.tensor([[worth(p, c.text) for c in replies()] for p in LETTERS], dtype=torch.float64)
    table = _table(base, path, taken).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.1)
    said = (taken >= 0).double()

    def token_logps() -> torch.Tensor:
        logps = table.log_softmax(-1)[:, path, taken.clamp(min=0)]
        return logps * said

    reference = token_logps().detach()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        logps = token_logps()
        chances = logps.sum(-1).detach().exp()
        others = torch.multinomial(chances, groups * (n - 1), replacement=True).view(len(LETTERS), groups, n - 1)
        pull = torch.stack([_advantages(r, r[o]) for r, o in zip(rewards, others, strict=True)])
        ratio = (reference - logps.detach()).exp()
        weight = (pull[..., None] + BETA * (ratio - 1)) / length[:, None] * said
        optimizer.zero_grad()
        (-(chances[..., None] * weight * logps).sum() / len(LETTERS)).backward()
        optimizer.step()
    return _figures(token_logps().sum(-1), reference.sum(-1), rewards)


def _table(base: Path, path: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """What the model says of the next token after each prefix, [prompt, prefix, token], in float64."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    network = AutoModelForCausalLM.from_pretrained(base).double()
    table = torch.zeros(len(LETTERS), int(path.max()) + 1, len(VOCABULARY), dtype=torch.float64)
    said = taken >= 0
    for i, letter in enumerate(LETTERS):
        ids = torch.tensor(tokenizer(letter)["input_ids"]).expand(len(path), -1)
        with torch.no_grad():
            logits = network(torch.cat([ids, taken.clamp(min=0)], 1)).logits[:, ids.shape[1] - 1 : -1]
        table[i, path[said]] = logits.log_softmax(-1)[said]
    return table


def _advantages(rewards: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """What each reply's advantage is on average over the others of its group, [replies]."""
    group = torch.cat([rewards[:, None, None].expand(-1, len(others), 1), others.expand(len(rewards), -1, -1)], -1)
    return ((rewards[:, None] - group.mean(-1)) / (group.std(-1) + 1e-4)).mean(-1)


def _paths() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every reply: the number of the prefix before each token, and the token (-1 behind the end); its length."""
    said = [c.ids or () for c in replies()]
    prefixes = {prefix: i for i, prefix in enumerate(dict.fromkeys(ids[:t] for ids in said for t in range(len(ids))))}
    path = [[prefixes.get(ids[:t], 0) if t < len(ids) else 0 for t in range(LONGEST)] for ids in said]
    taken = [[ids[t] if t < len(ids) else -1 for t in range(LONGEST)] for ids in said]
    return torch.tensor(path), torch.tensor(taken), torch.tensor([float(len(ids)) for ids in said])


def _figures(policy: torch.Tensor, reference: torch.Tensor, rewards: torch.Tensor) -> dict[str, float]:
    rows = zip(policy.tolist(), reference.tolist(), rewards.tolist(), strict=True)
    found = [Exact(p, q, r, BETA) for p, q, r in rows]
    start, best = fmean(e.start for e in found), fmean(e.optimum for e in found)
    reward, kl = fmean(e.reward for e in found), fmean(e.kl for e in found)
    assert math.isclose(fmean(e.mass for e in found), 1, abs_tol=1e-9)
    return {"gap_closed": (reward - BETA * kl - start) / (best - start), "exact_reward": reward, "exact_kl": kl}


if __name__ == "__main__":
    main(*sys.argv[1:])
