"""What a worker process does: work through one stage, or measure one cell. Plain data in, plain data out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from traceback import format_exc
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from prefopt.components import RewardSource, Sampler, Score, Task
from prefopt.config import DataConfig, RunConfig
from prefopt.config.load import validated
from prefopt.config.models import Section
from prefopt.config.stages import stage_from
from prefopt.config.yaml import Document
from prefopt.data.adapt import adapt
from prefopt.data.render import Renderer
from prefopt.engine.measure import Draws, Measured
from prefopt.engine.memory import peak_bytes, reset_peak
from prefopt.engine.models import Model, open_model
from prefopt.engine.rollout import draw
from prefopt.engine.services import EngineServices, RewardModel
from prefopt.errors import DataError, PrefoptError, ResourceError
from prefopt.making.stage import make
from prefopt.plugins import Plugins, load
from prefopt.rows import Prompt, Rollout, Row, show_text
from prefopt.session import default_sampler, train
from prefopt.stats import best_of_n_kl

SHOWN = 6
"""Prompts whose replies a report shows."""

_plugins: Plugins | None = None


class Measurement(Section):
    """What to measure: the model at `policy`, or the baseline with the reward model at `reward`."""

    seed: NonNegativeInt
    policy: str | None
    baseline: str
    reward: str | None = None
    best_of: Annotated[int, Field(ge=2)] | None = None
    tasks: tuple[Task, ...]
    sampler: Sampler | None
    prompts: PositiveInt
    held_out: DataConfig
    device: Literal["auto", "cpu", "cuda"] = "auto"


def warm(allow: list[str] | None) -> None:
    """Prepares a worker process: one thread, plugins loaded, no progress display of its own."""
    global _plugins
    torch.set_num_threads(1)
    _plugins = load(allow)
    _plugins.manager.unregister(name="prefopt:progress")


def work(task: str) -> str:
    """Carries out one task, `{"stage": CONFIG}` or `{"measure": MEASUREMENT}`, as JSON; so is the answer. Whatever goes
    wrong is an answer too, with the traceback when it is not a `PrefoptError`."""
    assert _plugins is not None, "the worker was not prepared"
    request = json.loads(task)
    try:
        if "stage" in request:
            return json.dumps(_stage(request["stage"], _plugins))
        measurement = validated(Measurement, Document(request["measure"]), _plugins.find)
        return json.dumps(measure(measurement, _plugins), allow_nan=False)
    except PrefoptError as error:
        return json.dumps({"error": [str(problem) for problem in error.problems]})
    except Exception as error:
        return json.dumps({"error": [f"{type(error).__name__}: {error}"], "traceback": format_exc()})


def _stage(config: Mapping[str, Any], plugins: Plugins) -> dict[str, Any]:
    stage = stage_from(Document(dict(config)), plugins.find)
    if not isinstance(stage, RunConfig):
        return {"rows": make(stage, plugins).rows}
    started = (Path(stage.run.dir) / "run.json").exists()
    return {"outcome": train(stage, plugins, resume=started).outcome}


def measure(measurement: Measurement, plugins: Plugins) -> dict[str, Any]:
    """Metrics, sample replies, and what answering cost beyond drawing one reply. A measurement that is not a finite
    number is left out."""
    bench = _Bench(measurement, plugins)
    with bench.closing:
        subject = bench.subject()
        metrics: dict[str, float] = {}
        for task in measurement.tasks:
            metrics |= {name: float(x) for name, x in task.evaluate(subject).items() if math.isfinite(x)}
        samples = _samples(subject, measurement.tasks)
    return {"metrics": metrics, "samples": samples, "answering": asdict(bench.answering)}


@dataclass(frozen=True)
class Answering:
    """What best-of-n took to answer: tokens of the replies it drew and did not give, tokens its reward model read,
    seconds of drawing and scoring, and the most memory in use meanwhile. All zero when a policy answers."""

    sampled: int = 0
    scored: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclass
class _Shared:
    """The held-out rows, and what the baseline drew for them. No model: a worker trains between measurements."""

    rows: list[Row]
    drawn: dict[int, list[Rollout]] = field(default_factory=dict)

    def once(self, draws: Draws) -> Draws:
        """The same draws, drawn once."""

        def drawn(n: int) -> list[Rollout]:
            if n not in self.drawn:
                self.drawn[n] = draws(n)
            return self.drawn[n]

        return drawn


_kept: dict[str, _Shared] = {}


@dataclass
class _Bench:
    """The models of one measurement."""

    measurement: Measurement
    plugins: Plugins
    answering: Answering = field(default=Answering())
    closing: ExitStack = field(default_factory=ExitStack)

    def subject(self) -> Measured:
        wanted = self.measurement
        device = _device(wanted.device)
        services = EngineServices(wanted.seed, device)
        rows = self._shared.rows
        if not rows:
            raise DataError("the data source has no rows", where="held_out")
        base = open_model(wanted.baseline, device)
        renderer = Renderer(base.tokenizer, wanted.held_out.max_length, wanted.held_out.overflow)
        baseline = self._shared.once(self._draws(base, renderer, rows, "suite baseline"))
        if wanted.reward is None or wanted.best_of is None:
            policy = open_model(wanted.policy or wanted.baseline, device)
            draws = self._draws(policy, renderer, rows, "suite")
            return Measured(rows, services, renderer, draws, baseline, policy, base, temperature=self._sampler.density)
        reward = services.scorer(wanted.reward)
        draws = self._best_of(self._draws(base, renderer, rows, "suite"), reward, wanted.best_of, device)
        bound = best_of_n_kl(wanted.best_of)
        return Measured(rows, services, renderer, draws, baseline, scorer=reward, bound=bound)

    @cached_property
    def _shared(self) -> _Shared:
        """What measurements against the same baseline share; the last of it is kept."""
        asked = self.measurement.model_dump_json(exclude={"policy", "reward", "best_of", "tasks"})
        if asked not in _kept:
            _kept.clear()
            _kept[asked] = _Shared(list(self.measurement.held_out.source.open(EngineServices(self.measurement.seed))))
        return _kept[asked]

    def _draws(self, model: Model, renderer: Renderer, rows: list[Row], purpose: str) -> Draws:
        prompts = adapt(rows[: self.measurement.prompts], Prompt)
        return lambda n: draw(self._sampler.open(model), renderer, prompts, n, self.measurement.seed, purpose)

    @cached_property
    def _sampler(self) -> Sampler:
        sampler = self.measurement.sampler or default_sampler(self.plugins)
        return self.closing.enter_context(sampler.running(EngineServices(self.measurement.seed)))

    def _best_of(
        self, draws: Draws, reward: RewardModel, n: int, device: torch.device
    ) -> Callable[[int], list[Rollout]]:
        """The completion with the highest reward of each n in turn. A larger draw holds the smaller ones, so only the
        last, the largest, is counted: the cost does not depend on the order in which tasks ask."""

        def best(count: int) -> list[Rollout]:
            reset_peak(device)
            began, before = time.perf_counter(), reward.tokens
            drawn = draws(count * n)
            scores = [[s.value for s in group] for group in reward(drawn)]
            winners = [_winners(group, values, n) for group, values in zip(drawn, scores, strict=True)]
            self.answering = Answering(
                sampled=_tokens(drawn) - _tokens(winners),
                scored=reward.tokens - before,
                seconds=time.perf_counter() - began,
                peak_memory_bytes=max(peak_bytes(device), self.answering.peak_memory_bytes),
            )
            return winners

        return best


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ResourceError("no CUDA device is available", where="base.run.device", fix="Set it to auto or cpu.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _tokens(rollouts: List[Rollout]) -> int:
    return sum(len(completion.ids or ()) for group in rollouts for completion in group.completions)


def _winners(group: Rollout, scores: List[float | None], n: int) -> Rollout:
    known = [-math.inf if score is None else score for score in scores]  # an unscored reply never wins
    best = [max(range(start, start + n), key=lambda i: known[i]) for start in range(0, len(known), n)]
    return replace(group, completions=tuple(group.completions[i] for i in best))


def _samples(subject: Measured, tasks: List[Task]) -> list[dict[str, Any]]:
    """A few replies, with the reward that the first task to use one measures by."""
    rollouts = [replace(group, completions=group.completions[:1]) for group in subject.rollouts(1)[:SHOWN]]
    sources = (getattr(task, "reward", None) for task in tasks)
    source = next((source for source in sources if isinstance(source, RewardSource)), None)
    scores = subject.reward(source)(rollouts) if source is not None else [[Score(None)]] * len(rollouts)
    return [
        {"prompt": show_text(group.prompt), "reply": group.completions[0].text, "reward": own[0].value}
        for group, own in zip(rollouts, scores, strict=True)
    ]
