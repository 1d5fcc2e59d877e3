"""The loop, one for every method. It knows an algorithm only through its declared needs and its pure functions.

rows -> [draw -> score -> keep] -> sequences -> batch -> columns (no gradient) -> prepare -> minibatches -> microbatches
-> loss -> backward -> accept -> update
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt.batch import Batch, StepContext
from prefopt.components import Algorithm, RolloutAlgorithm
from prefopt.config import OptimConfig
from prefopt.data.assemble import Assembled, Assembler
from prefopt.data.mix import Mix
from prefopt.data.streams import Order, derive
from prefopt.engine.backward import backward
from prefopt.engine.collect import Collector
from prefopt.engine.columns import Forwarder, fill
from prefopt.engine.forward import Scorer
from prefopt.engine.layout import members
from prefopt.engine.noise import Noise
from prefopt.engine.optimize import Optimizer, learning_rate
from prefopt.engine.ranks import unwrap
from prefopt.engine.recall import Recall
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
    collector: Collector | None = None
    noise: float | None = None
    recall: Recall | None = None
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
        built, recorded = self.begun(step)
        recorded["epoch"] = step / self.order.steps_per_epoch
        if built is None:
            self.progress.skipped += 1
            return recorded | {"rows/none_left": 1.0}
        built, found = self.prepared(built, self.context(step, self.state))
        found = recorded | self._under_base(built.batch) | found | self.passes(built, step)
        self._forget()
        return found

    def _under_base(self, batch: Batch) -> dict[str, float]:
        """How surprising the samples are to the reference: exp of the mean negative log-probability of a token."""
        if self.collector is None or "reference_logps" not in batch.columns or self.forwarder.temperature != 1:
            return {}
        mean = batch.sum_tokens(batch.reference_logps).sum() / batch.lengths.sum().clamp(min=1)
        return {"completion/base_perplexity": float(torch.exp(-mean))}

    def begun(self, step: int) -> tuple[Assembled | None, dict[str, float]]:
        """The tokens of a step, and what was measured while they were drawn."""
        if self.collector is None:
            return self.assembler(self.order.step(step)), {}
        self._forget()  # of a step that was left without rows
        found = self.collector(step)
        self.forwarder.meter.sampled += found.sampled
        return self.assembler.of(found.rollouts) if found.rollouts else None, dict(found.metrics)

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

    def passes(self, built: Assembled, step: int) -> dict[str, float]:
        """The updates of a step, as many as the algorithm wants of its samples. Metrics are means over them."""
        epochs, parts = self.algorithm.passes
        found: list[dict[str, float]] = []
        for epoch in range(epochs):
            for index in dealt(built.groups, parts, derive(self.seed, "minibatches", step, epoch)):
                minibatch = built if parts == 1 else built.minibatch(index)
                mixed = None if self.mix is None else self.mix.step(step * epochs * parts + len(found))
                metrics, verdict = self.update(self._active(minibatch), mixed, len(found))
                found.append(metrics)
                if verdict == "stop":
                    return _means(found)
        return _means(found)

    def _active(self, built: Assembled) -> Assembled:
        """What the loss depends on: sequences that are idle stay counted and are left out."""
        idle = self.algorithm.idle(built.batch) if isinstance(self.algorithm, RolloutAlgorithm) else None
        if idle is None or not idle.any():
            return built
        return built.select((~idle).nonzero().squeeze(1).tolist() or [0])  # one stays: a gradient of zero is a gradient

    def update(self, built: Assembled, mixed: Assembled | None, number: int) -> tuple[dict[str, float], str]:
        """One minibatch: the gradients of all its microbatches, those of what is mixed in, and an update if the
        algorithm accepts them. Before update `number` 0 of a step the policy is the one that was sampled."""
        gap = number == 0 and self.collector is not None
        metrics = backward(self.algorithm, self._training(number, "rows"), built, gap)
        if gap and self.recall is not None:
            metrics["sampler/reused"] = self.recall.share
            if not self.recall.share and not self.recall.short:
                self._warn_once("rollout.reuse_bytes has no effect: nothing that a step had drawn was looked up in it")
        if self.mix is not None and mixed is not None:
            found = backward(self.mix.algorithm, replace(self._training(number, "mix"), temperature=1.0), mixed)
            metrics["loss/total"] += found["loss/total"]
            metrics |= {f"mix/{name}": x for name, x in found.items()}
        metrics["gradient/norm"] = float(self.optimizer.clip())
        self._must_be_finite(metrics)
        rate = learning_rate(self.optim, self.progress.updates, self.updates)
        verdict = self._verdict(metrics)
        if verdict == "step":
            self._forget()
            self.optimizer.step(rate)
            self.progress.updates += 1
        self.progress.skipped += verdict != "step"
        self.optimizer.clear()
        return {**metrics, "lr": rate if verdict == "step" else 0.0}, verdict

    def _forget(self) -> None:
        """What was computed with weights that change now."""
        if self.recall is not None:
            self.recall.clear()

    def _training(self, number: int, part: str) -> Forwarder:
        """What runs over a part of update `number` of this step: with noise, in a run that asks for it."""
        if self.noise is None:
            return self.forwarder
        key = derive(self.seed, "embedding noise", self.progress.step, number, part)
        return replace(self.forwarder, noise=Noise(self.noise, key))

    @property
    def updates(self) -> int:
        """How many updates the run makes when none is left out."""
        epochs, parts = self.algorithm.passes
        return self.total * epochs * parts

    def _verdict(self, metrics: Mapping[str, float]) -> str:
        verdict = self.algorithm.accept(metrics)
        if verdict not in ("step", "skip", "stop"):
            raise PluginError(f"{type(self.algorithm).__name__}.accept returned {verdict!r}, not step, skip or stop")
        return verdict

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


def dealt(groups: List[int], parts: int, key: int) -> list[list[int]]:
    """The sequences of a step, dealt to at most `parts` minibatches, each group whole, by a random order."""
    if parts == 1:
        return [list(range(len(groups)))]
    places = members(groups)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(key)).tolist()
    hands = [sorted(i for k in order[hand::parts] for i in places[k]) for hand in range(parts)]
    return [hand for hand in hands if hand]


def _means(found: List[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for metrics in found for name in metrics)
    return {name: fmean(metrics[name] for metrics in found if name in metrics) for name in names}
