"""What each shortcut brings: the same DPO steps with one more of them at a time, interleaved in one process.

    python benchmarks/compare/ladder.py WORKLOAD OUT.json [BLOCKS]

Seconds are medians of steps, without the reference, which is kept from a pass before; losses and gradient
norms of all rungs must agree.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ours import build

from prefopt.engine.lastlayer import spared
from prefopt.engine.layout import PLAIN, Paths
from prefopt.engine.loop import Loop
from prefopt.engine.optimize import Optimizer
from prefopt.engine.probe import probe

STEPS = 6
SHARED = Paths("shared", tiled=True)


class Rung(NamedTuple):
    """Paths of the forward pass, and what is not among them."""

    paths: Paths
    in_place: bool = False
    spares: bool = False


RUNGS = {
    "plain: padded rows under a mask, whole logits": Rung(PLAIN),
    "rows without a mask": Rung(Paths("causal")),
    "tiled head on the positions that are scored": Rung(Paths("causal", tiled=True)),
    "a pair in one row": Rung(SHARED),
    "gradients of the vocabulary's matrix in place": Rung(SHARED, in_place=True),
    "the last layer where its states are looked at": Rung(SHARED, in_place=True, spares=True),
}


def climbed(workload: Path, folder: Path, rung: Rung) -> Loop:
    folder.mkdir()
    loop = build(workload, "dpo", STEPS, folder, ["optim.forward=plain"])
    scorer, paths = loop.scorer, rung.paths
    scorer.paths = paths
    if paths.layout == "shared":
        scorer.paths = paths = replace(paths, reach=probe(scorer, print).reach)
    if rung.spares:
        scorer.paths = replace(paths, spared=spared(scorer.network))
        assert scorer.paths.spared
    if rung.in_place:
        loop.optimizer = Optimizer(scorer, loop.optim, scorer.accumulate_in_place(head_is_used=True))
    return loop


def main() -> None:
    workload, out, blocks = Path(sys.argv[1]), Path(sys.argv[2]), int([*sys.argv, "3"][3])
    seconds: dict[str, list[float]] = {name: [] for name in RUNGS}
    with tempfile.TemporaryDirectory() as folder:
        loops = {name: climbed(workload, Path(folder) / str(i), rung) for i, (name, rung) in enumerate(RUNGS.items())}
        first = {name: loop.step(0) for name, loop in loops.items()}
        for name in ("loss/total", "gradient/norm"):
            values = [metrics[name] for metrics in first.values()]
            assert max(values) - min(values) < 1e-5 * max(values), (name, values)
        for _ in range(blocks):
            for step in range(1, STEPS):
                for name, loop in loops.items():
                    began = time.perf_counter()
                    loop.step(step)
                    seconds[name].append(time.perf_counter() - began)
    found = {name: median(taken) for name, taken in seconds.items()}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    slowest = next(iter(found.values()))
    for name, taken in found.items():
        print(f"{name:50s} {taken:6.2f} s  x{slowest / taken:.2f}")


if __name__ == "__main__":
    main()
