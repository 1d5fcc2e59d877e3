"""Evaluation on held-out rows while a run goes on. It changes nothing: no gradient, no state, no random stream of
training."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass

import torch

from prefopt.batch import Policy
from prefopt.config import EvalConfig
from prefopt.data.assemble import Assembled
from prefopt.engine.loop import Loop, Progress
from prefopt.engine.measure import Measured
from prefopt.errors import ConfigError, did_you_mean
from prefopt.rows import Rollout, Row


@dataclass
class Evaluator:
    """Measures the model of a loop. `subject` makes a fresh view of it at a step, for `rows`, for tasks and samples."""

    config: EvalConfig
    built: Assembled
    rows: List[Row]
    subject: Callable[[int, List[Row]], Measured] | None
    on_samples: Callable[[int, list[Rollout]], None]

    def __call__(self, loop: Loop) -> dict[str, float]:
        """Held-out loss and metrics, task measurements, and with samples the KL divergence from the reference."""
        metrics = self._losses(loop)
        if self.subject is not None:
            step = loop.progress.step
            if self.config.samples:
                metrics |= self._sampled(self.subject(step, self.rows[: self.config.samples]), step)
            subject = self.subject(step, self.rows)
            for task in self.config.tasks:
                metrics |= task.evaluate(subject)
        return metrics

    def _losses(self, loop: Loop) -> dict[str, float]:
        state = {name: x.clone() for name, x in loop.state.items()}
        built, _ = loop.prepared(self.built, loop.context(loop.progress.step, state))
        outputs = loop.forwarder.whole(built, loop.algorithm.needs().during)
        with torch.no_grad():
            loss = loop.algorithm.loss(built.batch, Policy(outputs))
        return {"loss/total": float(loss.value), **{name: float(x) for name, x in loss.metrics.items()}}

    def _sampled(self, subject: Measured, step: int) -> dict[str, float]:
        """`kl/sequence` is the Monte-Carlo mean of log policy - log reference over samples of the policy (k1)."""
        rollouts = subject.rollouts(1)
        self.on_samples(step, rollouts)
        lengths = [len(c.ids or ()) for group in rollouts for c in group.completions]
        metrics = {"completion/tokens": sum(lengths) / len(lengths)}
        ratios = subject.log_ratios(rollouts)
        if ratios is not None:
            flat = [x for group in ratios for x in group]
            metrics["kl/sequence"] = sum(flat) / len(flat)
        return metrics


def judge(metrics: dict[str, float], config: EvalConfig, progress: Progress) -> bool:
    """Notes whether this evaluation is the best so far, and stops the run when patience ends; True when it is the
    best."""
    if config.metric not in metrics:
        raise ConfigError(f"eval.metric `{config.metric}` is not measured. {did_you_mean(config.metric, metrics)}")
    value = metrics[config.metric]
    better = progress.best is None or (value < progress.best if config.goal == "min" else value > progress.best)
    if better:
        progress.best, progress.best_step, progress.worse = value, progress.step, 0
    else:
        progress.worse += 1
        progress.stopped |= config.patience is not None and progress.worse >= config.patience
    return better
