"""prefopt's side: `python ours.py WORKLOAD METHOD TOTAL_STEPS [GRADIENTS] [KEY=VALUE...]`, as `worker.py` says.

METHOD is dpo, sft, reward_model, orpo, kto, grpo or rloo; GRADIENTS a file for those of the first step; KEY=VALUE
overrides the configuration. What grpo and rloo draw lies in the run's folder: `run.dir` says where.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from worker import BETA, PROMPTS, SAMPLES, TOKENS, Steps, answer, orders, peak_mb, resident_mb, roof, rows_of, versions

from prefopt import session
from prefopt.config import load_run
from prefopt.engine.columns import asked
from prefopt.engine.compiled import Compiled
from prefopt.engine.folder import RunFolder
from prefopt.engine.loop import Loop
from prefopt.engine.memory import give_back
from prefopt.engine.models import Model
from prefopt.engine.ranks import Ranks
from prefopt.engine.reference import Cached, Resident
from prefopt.engine.store import Store
from prefopt.plugins import load

CONFIG = """
prefopt: 1
model: {{path: {workload}/{model}}}
data: {{source: jsonl, path: {workload}/{rows}.jsonl}}
algorithm: {{name: {method}{settings}}}
optim: {{lr: 1.0e-5, batch_size: {rows_a_step}, schedule: constant, max_grad_norm: 1.0e9}}
run: {{dir: {folder}/run, steps: {steps}, device: cpu, threads: 2}}
"""
DRAWN = f"""
sampler: {{name: continuous, max_new_tokens: {TOKENS}}}
reward: {{name: function, function: {Path(__file__).with_name("reward.py")}:letters}}
"""


@dataclass(frozen=True)
class InOrder:
    """Rows as they stand in the file, as the other side reads them."""

    size: int
    steps_per_epoch: int

    def step(self, step: int) -> list[int]:
        return list(range(step * self.size, (step + 1) * self.size))


def build(workload: Path, method: str, steps: int, folder: Path, overrides: list[str]) -> Loop:
    """A loop over the pairs in order."""
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    (folder / "run.yaml").write_text(written(workload, method, steps, folder))
    config = load_run(folder / "run.yaml", plugins.find, overrides)
    run = session.Session(config, plugins, Ranks("cpu", 2), RunFolder(Path(config.run.dir)), print)
    run.folder.create()
    fill = run._fill

    def in_order(reference, loop, evaluator):  # type: ignore[no-untyped-def]
        loop.order = InOrder(config.optim.batch_size, steps)
        fill(reference, loop, evaluator)

    run._fill = in_order  # type: ignore[method-assign]
    loop, _ = run.assemble()
    loop.order = InOrder(config.optim.batch_size, steps)  # type: ignore[assignment]
    if loop.collector is not None:
        loop.collector.order = loop.order
        Model.end_ids = frozenset()  # type: ignore[assignment,method-assign]  # an end that never comes
    return loop


def reference_pass(loop: Loop, steps: range) -> float:
    """Seconds a step that the reference takes over their rows when none of them is kept; the policy stands in for it,
    whose weights are as many."""
    if not isinstance(loop.reference, Cached):
        return 0.0
    forwarder = loop.forwarder
    device, budget = forwarder.ranks.device, forwarder.budget
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "reference.sqlite")
        empty = Cached(Resident(loop.scorer, device, budget, frozen=True), store)
        began = time.perf_counter()
        for step in steps:
            built = loop.assembler(loop.order.step(step))
            part = built.select(asked(built, loop.algorithm, "reference_logps"))
            empty.share(part.tokens, part.groups, forwarder.ranks)
        seconds = time.perf_counter() - began
        empty.close()
        return seconds / len(steps)


def written(workload: Path, method: str, steps: int, folder: Path) -> str:
    """The configuration of a run."""
    settings = {"workload": workload, "method": method, "folder": folder, "steps": steps}
    settings["rows"] = rows_of(method)
    settings["rows_a_step"] = PROMPTS if method in BETA else 8
    settings["settings"] = ", nll: sequence" if method == "orpo" else ""  # TRL's dialect
    if method in BETA:
        settings["settings"] = f", n: {SAMPLES}, beta: {BETA[method]}"
    settings["model"] = "classifier" if method == "reward_model" else "model"
    return CONFIG.format(**settings) + (DRAWN if method in BETA else "")


def main() -> None:
    workload, method, total = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    rest = sys.argv[4:]
    gradients = next((Path(a) for a in rest if "=" not in a), None)
    folder = Path(tempfile.mkdtemp())
    loop = build(workload, method, total, folder, [a for a in rest if "=" in a])
    if gradients is not None:
        step = loop.optimizer.step
        loop.optimizer.step = lambda rate: (_keep(loop, gradients), step(rate))  # type: ignore[assignment,func-returns-value]
    done = 0
    give_back()
    paths = loop.scorer.paths
    fast = paths.layout == "shared" and paths.tiled and bool(paths.spared)
    answer(ready=True, versions=versions(), resident_mb=resident_mb(), torch=torch.__version__, fast=fast)
    for count in orders():
        speed, steps = roof(), Steps(reference_pass(loop, range(done, done + count)))
        for _ in range(count):
            began = time.perf_counter()
            metrics = loop.step(done)
            steps.seconds.append(time.perf_counter() - began)
            steps.losses.append(metrics["loss/total"])
            steps.norms.append(metrics["gradient/norm"])
            steps.reused.append(metrics.get("sampler/reused", 0.0))
            done += 1
        answer(roof=speed, compiled=Compiled.knows(loop.scorer.network), **asdict(steps))
    shutil.rmtree(folder)
    answer(peak_mb=peak_mb())


def _keep(loop: Loop, path: Path) -> None:
    if not path.exists():
        found = {name: p.grad for name, p in loop.scorer.network.named_parameters() if p.grad is not None}
        save_file({name: x.clone() for name, x in found.items()}, path)


if __name__ == "__main__":
    main()
