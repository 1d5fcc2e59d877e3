"""A pretrained story model learns from a word list: what PPO and GRPO gain, how far they go for it, and whether the
alarms ring where KL costs nothing. Writes `benchmarks/results/stories.json` and `docs/images/stories.svg`.

    python benchmarks/stories.py [FOLDER]

`PREFOPT_DATA` says where model and words are. FOLDER is where the runs are kept; what is there is not run again.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from os.path import expandvars
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from prefopt.bench.plots import Axis
from prefopt.bench.report import short_commit
from prefopt.config import read_document, run_from
from prefopt.engine.folder import write_text
from prefopt.plugins import load
from prefopt.session import train
from prefopt.stats import t_interval

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "benchmarks/real/stories.yaml"
RESULT = ROOT / "benchmarks/results/stories.json"
IMAGE = ROOT / "docs/images/stories.svg"
SEEDS = range(3)
PPO, GRPO = "name: ppo, n: 4, inner_epochs: 1, minibatches: 2, truncated: end", "name: grpo, n: 4"
METHODS = {
    "PPO": f"{{{PPO}, beta: 0.05}}",
    "GRPO": f"{{{GRPO}, beta: 0.3}}",
    "PPO, KL costs nothing": f"{{{PPO}, beta: 0.0}}",
    "GRPO, KL costs nothing": f"{{{GRPO}, beta: 0.0}}",
}
WATCHED = {
    "reward": "reward/mean",
    "perplexity": "completion/base_perplexity",
    "distinct_3": "completion/distinct_3",
    "kl": "kl/sequence",
}
"""What is drawn for a step is drawn before its update: the first of a curve is the base. Where KL costs nothing no
base stands beside the policy, and no perplexity under it is measured."""
LAST = 5
"""Steps at the end whose mean is compared with the first."""


def main(folder: str = "runs/stories") -> None:
    jobs = [(label, seed, Path(folder).resolve() / f"{i}-{seed}") for i, label in enumerate(METHODS) for seed in SEEDS]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(run, jobs))
    told = {
        label: summary([f for (name, *_), f in zip(jobs, found, strict=True) if name == label]) for label in METHODS
    }
    for label, facts in told.items():
        print(
            f"{label:24}", *(f"{name} {facts[name]}" for name in facts if name == "gained" or name.endswith("_ratio"))
        )
        print(*(f"    {verdict}" for verdict in facts["verdicts"]), sep="\n")
    report = {
        "commit": short_commit(),
        "torch": torch.__version__,
        "seeds": len(SEEDS),
        "files": hashes(),
        "methods": told,
    }
    write_text(RESULT, json.dumps(report, indent=1) + "\n")
    write_text(IMAGE, drawing({label: facts["curves"] for label, facts in told.items()}))


def run(job: tuple[str, int, Path]) -> dict[str, Any]:
    """The curves of one run, its verdict, and the samples at its end."""
    label, seed, folder = job
    torch.set_num_threads(1)
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    if not (folder / "result.json").exists():
        overrides = [f"algorithm={METHODS[label]}", f"run.seed={seed}", f"run.dir={folder}"]
        written = read_document(CONFIG, overrides)
        train(run_from(written, plugins.find), plugins)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {name: [line[key] for line in lines if key in line] for name, key in WATCHED.items()}
    drawn = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    samples = [one["prompt"] + one["completion"] for one in drawn if one["step"] == drawn[-1]["step"]]
    verdict = json.loads((folder / "result.json").read_text())["verdict"]
    return {"curves": curves, "verdict": verdict, "samples": samples}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seeds together: what was gained, and what perplexity and distinct-3 ended at, in terms of their start."""
    curves = {name: [one["curves"][name] for one in runs] for name in WATCHED}
    measured = [name for name in ("perplexity", "distinct_3") if all(curves[name])]
    return {
        "gained": interval([fmean(c[-LAST:]) - c[0] for c in curves["reward"]]),
        **{f"{name}_ratio": interval([fmean(c[-LAST:]) / c[0] for c in curves[name]]) for name in measured},
        "verdicts": [one["verdict"] for one in runs],
        "curves": curves,
        "samples": runs[0]["samples"],
    }


def interval(values: list[float]) -> list[float]:
    found = t_interval(values)
    return [round(x, 3) for x in (found.mean, found.low, found.high) if x is not None]


def hashes() -> dict[str, str]:
    """sha256 of model and word list, by their names."""
    document = read_document(CONFIG)
    model, words = (Path(expandvars(document.at(section, "path").data)) for section in ("model", "reward"))
    paths = (model / "model.safetensors", words)
    return {f"{path.parent.name}/{path.name}": sha256(path.read_bytes()).hexdigest() for path in paths}


# --- the picture ----------------------------------------------------------------------------------------------------

COLOURS = ("#1f6feb", "#b54708", "#8ab6f9", "#f0b48a")
TITLES = {"reward": "reward", "perplexity": "perplexity under the base", "distinct_3": "distinct-3"}
SIDE, GAP, TOP = 230, 60, 46


def drawing(curves: dict[str, dict[str, list[list[float]]]]) -> str:
    """A panel for each figure, a line for each seed."""
    panels = "".join(_panel(i, name, curves) for i, name in enumerate(TITLES))
    legend = "".join(
        f'<text x="{GAP + 210 * i}" y="16" fill="{colour}">{label}</text>'
        for i, (label, colour) in enumerate(zip(curves, COLOURS, strict=True))
    )
    size = f'width="{len(TITLES) * (SIDE + GAP) + 20}" height="{SIDE + TOP + 34}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return f'{head}<rect width="100%" height="100%" fill="white"/>{legend}{panels}</svg>\n'


def _panel(i: int, name: str, curves: dict[str, dict[str, list[list[float]]]]) -> str:
    left, bottom = GAP + i * (SIDE + GAP), TOP + SIDE
    values = [x for method in curves.values() for seed in method[name] for x in seed]
    longest = max(len(seed) for method in curves.values() for seed in method[name])
    across, up = Axis(0, longest - 1, left, left + SIDE), Axis.over(values, bottom, TOP)
    lines = "".join(
        f'<polyline fill="none" stroke="{colour}" points="{_points(seed, across, up)}"/>'
        for method, colour in zip(curves.values(), COLOURS, strict=True)
        for seed in method[name]
    )
    ticks = "".join(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{text}</text>' for y, text in up.ticks(5))
    frame = f'<path d="M{left} {TOP}V{bottom}H{left + SIDE}" fill="none" stroke="#888"/>'
    title = f'<text x="{left}" y="{TOP - 10}" font-weight="bold">{TITLES[name]}</text>'
    return f'{title}{frame}{ticks}{lines}<text x="{left}" y="{bottom + 18}">steps of 32 prompts, three seeds</text>'


def _points(curve: list[float], across: Axis, up: Axis) -> str:
    return " ".join(f"{across(t)},{up(x)}" for t, x in enumerate(curve))


if __name__ == "__main__":
    main(*sys.argv[1:])
