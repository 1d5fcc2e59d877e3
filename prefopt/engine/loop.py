"""The loop, one for every method. It knows an algorithm only through its declared needs and its pure functions.

rows -> sequences -> batch -> columns (no gradient) -> prepare -> microbatches -> loss -> backward -> accept -> update
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt.batch import StepContext
from prefopt.components import Algorithm
from prefopt.config import OptimConfig
from prefopt.data.assemble import Assembled, Assembler
from prefopt.data.mix import Mix
from prefopt.data.streams import Order, derive
from prefopt.engine.backward import backward
from prefopt.engine.columns import Forwarder, fill
from prefopt.engine.forward import Scorer
from prefopt.engine.optimize import Optimizer, learning_rate
from prefopt.engine.ranks import unwrap
from prefopt.engine.reference import Reference
from prefopt.errors import PluginError, ResourceError

Outcome = Literal["finished", "stopped", "preempted"]


@dataclass
class Progress:
    """How far a run has come: all of its state that is not a tensor."""

    step: int = 0
    updates: int = 0
    skipped: int = 0
    stopped: bool = False
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    meter: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Loop:
    """Everything a run is made of, and the steps over it."""

    algorithm: Algorithm
    optim: OptimConfig
    assembler: Assembler
    order: Order
    total: int
    seed: int
    forwarder: Forwarder
    optimizer: Optimizer
    reference: Reference | None
    mix: Mix | None = None
    progress: Progress = field(default_factory=Progress)
    state: dict[str, Tensor] = field(default_factory=dict)
    warn: Callable[[str], None] = print
    warned: set[str] = field(default_factory=set)

    def run(self, after_step: Callable[[dict[str, float], float], None]) -> None:
        """Steps until the end or until something stops the run; `after_step` gets each step's metrics and seconds."""
        while self.progress.step < self.total and not self.progress.stopped:
            began = time.perf_counter()
            metrics = self.step(self.progress.step)
            self.progress.step += 1
            if self.reference is not None:
                self.reference.follow(self.scorer, self.progress.step)
            after_step(metrics, time.perf_counter() - began)

    def step(self, step: int) -> dict[str, float]:
        """One global step; returns its metrics. A step left without rows changes nothing but a count."""
        built = self.assembler(self.order.step(step))
        epoch = {"epoch": step / self.order.steps_per_epoch}
        if built is None:
            self.progress.skipped += 1
            return epoch | {"rows/none_left": 1.0}
        built, recorded = self.prepared(built, self.context(step, self.state))
        return epoch | recorded | self.update(built, self.mix.step(step) if self.mix is not None else None)

    def context(self, step: int, state: dict[str, Tensor]) -> StepContext:
        """What `prepare` may use: random streams named by seed, step and purpose."""

        def make(purpose: str) -> torch.Generator:
            return torch.Generator().manual_seed(derive(self.seed, "prepare", step, purpose))

        return StepContext(step, state, make, warn=self._warn_once)

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            self.warn(message)

    def prepared(self, built: Assembled, ctx: StepContext) -> tuple[Assembled, dict[str, float]]:
        """The step with its columns, after the algorithm's `prepare`."""
        built = fill(built, self.algorithm, self.forwarder, self.reference)
        with torch.no_grad():
            batch = self.algorithm.prepare(built.batch, ctx)
        found = Assembled(batch, built.tokens)
        return found if len(batch.trained) == len(batch) else found.select(batch.trained), ctx.recorded

    def update(self, built: Assembled, mixed: Assembled | None = None) -> dict[str, float]:
        """One minibatch: the gradients of all its microbatches, those of what is mixed in, and an update if the
        algorithm accepts them."""
        metrics = backward(self.algorithm, self.forwarder, built)
        if self.mix is not None and mixed is not None:
            found = backward(self.mix.algorithm, self.forwarder, mixed)
            metrics["loss/total"] += found["loss/total"]
            metrics |= {f"mix/{name}": x for name, x in found.items()}
        metrics["gradient/norm"] = float(self.optimizer.clip())
        self._must_be_finite(metrics)
        rate = learning_rate(self.optim, self.progress.updates, self.total)
        accepted = self._accept(metrics)
        if accepted:
            self.optimizer.step(rate)
            self.progress.updates += 1
        self.optimizer.clear()
        return {**metrics, "lr": rate if accepted else 0.0}

    def _accept(self, metrics: Mapping[str, float]) -> bool:
        verdict = self.algorithm.accept(metrics)
        if verdict not in ("step", "skip", "stop"):
            raise PluginError(f"{type(self.algorithm).__name__}.accept returned {verdict!r}, not step, skip or stop")
        self.progress.stopped = verdict == "stop"
        self.progress.skipped += verdict == "skip"
        return verdict == "step"

    def _must_be_finite(self, metrics: Mapping[str, float]) -> None:
        for name in ("loss/total", "gradient/norm"):
            if not math.isfinite(metrics[name]):
                raise ResourceError(
                    f"{name} is {metrics[name]} in step {self.progress.step + 1}; the model was not updated",
                    fix="Lower optim.lr, or look at the rows of this step. The last checkpoint is untouched.",
                )

    @property
    def scorer(self) -> Scorer:
        inner = unwrap(self.forwarder.module)
        assert isinstance(inner, Scorer)
        return inner

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor a checkpoint holds."""
        groups = {
            "model": self.scorer.kept(),
            "optimizer": self.optimizer.state(),
            "algorithm": dict(self.state),
            "reference": self.reference.state() if self.reference else {},
        }
        return {name: tensors for name, tensors in groups.items() if tensors}

    def recount(self, counts: Mapping[str, int]) -> None:
        """Sets what was counted of the rows, as `snapshot` keeps it."""
        for assembler, prefix in ((self.assembler, ""), (self.mix.assembler if self.mix else None, "mix/")):
            if assembler is not None:
                assembler.counts.clear()
                own = {name: n for name, n in counts.items() if name.startswith("mix/") == bool(prefix)}
                assembler.counts.update({name.removeprefix(prefix): n for name, n in own.items()})

    def snapshot(self) -> dict[str, Any]:
        """Everything else a checkpoint holds."""
        self.progress.meter = asdict(self.forwarder.meter)
        mixed = {f"mix/{name}": n for name, n in self.mix.assembler.counts.items()} if self.mix is not None else {}
        self.progress.counts = {name: n for name, n in sorted({**self.assembler.counts, **mixed}.items()) if n}
        return asdict(self.progress)
