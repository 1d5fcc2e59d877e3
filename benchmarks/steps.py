"""Kernels of compiled steps beside what they stand for: products, attention, and whole steps of drawing, on a CPU.

    python benchmarks/steps.py WORKLOAD [--threads 2] [--turns 60]

WORKLOAD is made by `compare/workload.py`. Each number is a median of turns, milliseconds, both sides in turn in one
process; numbers are compared first. *Products*: all of one step. *Attention*: of one layer, rows of eight prompts, with
tokens of their own; other memory is read between two calls. *Steps*: whole ones, with `rollout.compile` and without.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rollout import read_prompts
from torch import Tensor

from prefopt.engine.compiled import Compiled
from prefopt.engine.fewrows import Product, Step, attention
from prefopt.engine.kernels import Panels, attend
from prefopt.engine.models import open_model
from prefopt.engine.pages import PAGE, Sharing
from prefopt.engine.ranks import Ranks
from prefopt.engine.shared import Shared
from prefopt.engine.shortrows import Asked

ROWS = (1, 2, 4, 8, 16, 24, 32, 64, 128)
OWN = ((64, 8), (40, 24), (32, 32), (16, 48), (8, 64), (2, 100))
PROMPTS, SAMPLES, ROOM = 8, 8, 130
OTHER = torch.zeros(4_000_000)
"""Is read between two calls of attention, whose layers take turns with products in a step."""
Side = Callable[[], Any]


def in_turn(sides: Sequence[Side], turns: int, between: Side = lambda: None) -> list[float]:
    taken: list[list[float]] = [[] for _ in sides]
    for turn in range(turns + 2):
        for number in range(len(sides))[:: -1 if turn % 2 else 1]:
            between()
            began = time.perf_counter()
            sides[number]()
            taken[number].append(1e3 * (time.perf_counter() - began))
    return [median(each[2:]) for each in taken]


def told(what: str, names: tuple[str, str], found: Sequence[float]) -> None:
    print(f"{what}: {names[0]} {found[0]:.2f}, {names[1]} {found[1]:.2f}, ratio {found[1] / found[0]:.2f}", flush=True)


def products(network: Any, turns: int) -> None:
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    sides = [[kind([layer]) for layer in layers] for kind in (Product, Panels)]
    for side in sides:
        for product in side:
            product.ready()
    for n in ROWS:
        given = [torch.randn(n, layer.in_features) for layer in layers]

        def compute(side: list[Product], given: list[Tensor] = given) -> list[Tensor]:
            return [product.whole(x) for product, x in zip(side, given, strict=True)]

        for a, b in zip(*map(compute, sides), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        found = in_turn([lambda side=side: compute(side) for side in sides], turns)
        told(f"products of {n} rows", ("oneDNN", "panels"), found)


def attentions(config: Any, sizes: list[int], turns: int) -> None:
    """Of prompts with these numbers of tokens."""
    heads, size = config.num_attention_heads, config.head_dim
    counts = [-(-n // PAGE) for n in sizes]
    starts = [sum(counts[:i]) for i in range(len(sizes))]
    prompts = torch.randn(sum(counts), heads, size, PAGE), torch.randn(sum(counts), heads, PAGE, size)
    for n, own in OWN:
        which = [i * len(sizes) // max(n, len(sizes)) for i in range(n)]
        step = Step(Sharing([tuple(range(starts[i], starts[i] + counts[i])) for i in which]), [own] * n)
        step.prompts = prompts
        mask = torch.ones(n, 1, 1, step.longest + own, dtype=torch.bool)
        for row, i in enumerate(which):
            mask[row, ..., sizes[i] : step.longest] = False
        kept = (torch.randn(64, heads, ROOM, size)[:n, :, :own] for _ in range(2))
        asked = Asked(torch.randn(n, heads, 1, size), *kept, mask)
        sides = [lambda f=f, asked=asked, step=step: f(asked, step) for f in (attention, attend)]
        torch.testing.assert_close(*(side() for side in sides), atol=1e-5, rtol=1e-4)
        found = in_turn(sides, turns, OTHER.sum)
        told(f"attention of {n} rows with {own} tokens of their own", ("PyTorch", "kernel"), found)


def steps(network: Any, prompts: list[tuple[int, ...]], turns: int) -> None:
    for n in ROWS[:-1]:
        rows = [prompts[i * len(prompts) // n] for i in range(n)]
        arenas = [kind(network, n, max(map(len, rows)), 2 * turns) for kind in (Shared, Compiled)]
        for arena in arenas:
            for prompt in dict.fromkeys(rows):
                first, *others = (i for i, row in enumerate(rows) if row == prompt)
                arena.read([prompt[:-1]], [first])
                arena.copy(first, others, len(prompt) - 1)
        taken = [0, 0]

        def advance(side: int, n: int = n, rows: Any = rows, arenas: Any = arenas, taken: Any = taken) -> Tensor:
            places = torch.tensor([len(prompt) - 1 + taken[side] for prompt in rows])
            taken[side] += 1
            return arenas[side].advance(torch.arange(n) + 5, places, int(places.max()) + 1)  # type: ignore[no-any-return]

        torch.testing.assert_close(advance(0), advance(1), atol=1e-3, rtol=1e-3)
        found = in_turn([lambda: advance(0), lambda: advance(1)], turns)
        told(f"steps of {n} rows", ("plain", "compiled"), found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=60)
    options = parser.parse_args()
    Ranks("cpu", options.threads)  # a run begins with it, and keeps what is freed from then on
    model = open_model(str(options.workload / "model"), torch.device("cpu"))
    prompts = read_prompts(options.workload, PROMPTS, SAMPLES)
    products(model.network, options.turns // 4)
    attentions(model.network.config, [len(prompt) for prompt in dict.fromkeys(prompts)], options.turns)
    steps(model.network, prompts, options.turns)


if __name__ == "__main__":
    main()
