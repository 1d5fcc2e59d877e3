"""Evaluation on held-out rows while a run goes on. It changes nothing: no gradient, no state, no random stream of
training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace

import torch

from prefopt.batch import Policy
from prefopt.components import Scorer, Task
from prefopt.config import EvalConfig
from prefopt.data.assemble import Assembled
from prefopt.engine.loop import Loop, Progress
from prefopt.engine.measure import Measured
from prefopt.errors import ConfigError, DataError, PrefoptError, did_you_mean
from prefopt.rows import Rollout, Row

LOSS, REWARD = "loss/total", "reward/mean"
SAMPLED = ("completion/tokens", "kl/sequence")
REHEARSED = 2


@dataclass
class Evaluator:
    """Measures the model of a loop. `subject` makes a fresh view of it at a step, for `rows`, for tasks and samples.

    `built` are the rows to compute the loss of; a run that samples has none, and a `reward` for what it samples.
    """

    config: EvalConfig
    built: Assembled | None
    rows: List[Row]
    subject: Callable[[int, List[Row]], Measured] | None
    on_samples: Callable[[int, list[Rollout]], None]
    reward: Scorer | None = None

    def __call__(self, loop: Loop) -> dict[str, float]:
        """Held-out loss and metrics, task measurements, and with samples the KL divergence from the reference."""
        metrics = self._losses(loop, self.built) if self.built is not None else {}
        if self.subject is not None:
            step = loop.progress.step
            if self.config.samples:
                metrics |= self._sampled(self.subject(step, self.rows[: self.config.samples]), step)
            subject = self.subject(step, self.rows)
            for task in self.config.tasks:
                metrics |= task.evaluate(subject)
        return metrics

    def rehearse(self, loop: Loop) -> None:
        """Measures a little before anything is trained, and forgets it. Raises what the first evaluation would raise
        for a task that does not fit the run, or for a metric that nobody measures."""
        if self.config.metric in (None, LOSS) and not self.config.tasks:
            return
        spent = replace(loop.forwarder.meter)
        metrics = set(self._losses(loop, self.built)) if self.built is not None else set()
        if self.config.samples:
            metrics |= {*SAMPLED, *([REWARD] if self.reward is not None else ())}
        failed = [task for task in self.config.tasks if not self._tried(task, metrics)]
        loop.forwarder.meter = spent
        if not failed and self.config.metric is not None:
            known(self.config.metric, metrics)

    @property
    def metric(self) -> str:
        """The metric that decides what is best."""
        return self.config.metric or (LOSS if self.built is not None else REWARD)

    def _tried(self, task: Task, metrics: set[str]) -> bool:
        """Adds what a task measures; False when it fails on so few rows for a reason of its own."""
        assert self.subject is not None
        try:
            metrics.update(task.evaluate(self.subject(0, self.rows[:REHEARSED])))
        except DataError:  # so few rows may lack what all of them have
            return False
        except PrefoptError as error:
            section = f"eval.tasks, task `{task.name}`"
            raise ConfigError(*(replace(p, where=p.where or section) for p in error.problems)) from None
        except Exception:  # a measurement of many rows may not work with a few
            return False
        return True

    def _losses(self, loop: Loop, given: Assembled) -> dict[str, float]:
        state = {name: x.clone() for name, x in loop.state.items()}
        built, _ = loop.prepared(given, loop.context(loop.progress.step, state))
        outputs = loop.forwarder.whole(built, loop.algorithm.needs().during)
        with torch.no_grad():
            loss = loop.algorithm.loss(built.batch, Policy(outputs))
        return {LOSS: float(loss.value), **{name: float(x) for name, x in loss.metrics.items()}}

    def _sampled(self, subject: Measured, step: int) -> dict[str, float]:
        """`kl/sequence` is the Monte-Carlo mean of log policy - log reference over samples of the policy (k1)."""
        rollouts = subject.rollouts(1)
        self.on_samples(step, rollouts)
        lengths = [len(c.ids or ()) for group in rollouts for c in group.completions]
        metrics = {SAMPLED[0]: sum(lengths) / len(lengths)}
        ratios = subject.log_ratios(rollouts)
        if ratios is not None:
            flat = [x for group in ratios for x in group]
            metrics[SAMPLED[1]] = sum(flat) / len(flat)
        if self.reward is not None:
            values = [score.value for own in self.reward(rollouts) for score in own if score.value is not None]
            metrics |= {REWARD: sum(values) / len(values)} if values else {}
        return metrics


def known(metric: str, metrics: Iterable[str]) -> None:
    """Raises `ConfigError` when `metric` is not among the metrics."""
    if metric not in metrics:
        raise ConfigError(f"`{metric}` is not measured", where="eval.metric", fix=did_you_mean(metric, metrics))


def judge(metrics: dict[str, float], metric: str, config: EvalConfig, progress: Progress) -> bool:
    """Notes whether this evaluation is the best so far by `metric`, and stops the run when patience ends; True when it
    is the best. A run that asks for nothing of the kind may lack the metric."""
    if metric not in metrics and config.metric is None and config.patience is None and not config.keep_best:
        return False
    known(metric, metrics)
    value = metrics[metric]
    better = progress.best is None or config.better(metric, value, progress.best)
    if better:
        progress.best, progress.best_step, progress.worse = value, progress.step, 0
    else:
        progress.worse += 1
        progress.stopped |= config.patience is not None and progress.worse >= config.patience
    return better
