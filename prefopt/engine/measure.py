"""A trained model under evaluation: what tasks may ask of it. It draws once, however many tasks ask: draw k of a prompt
does not depend on how many are drawn."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace

from prefopt.components import Judge, RewardSource, Score, Scorer, Services
from prefopt.data.render import Renderer, Tokens
from prefopt.engine.forward import Scorer as Module
from prefopt.engine.models import Model
from prefopt.engine.reference import Resident
from prefopt.errors import ConfigError
from prefopt.rows import Rollout, Row
from prefopt.verdicts import Comparer

Draws = Callable[[int], list[Rollout]]
TOKEN_BUDGET = 16_384


@dataclass
class Measured:
    """Implements `prefopt.components.Subject`.

    `draws` and `baseline_draws` give n completions for each row; `policy` and `other` are the models behind them, where
    they have densities; `scorer` is the reward model under evaluation, if one is. `temperature` is that of the draws,
    None when they come from another distribution than softmax(logits / temperature).
    """

    rows: List[Row]
    services: Services
    renderer: Renderer
    draws: Draws | None = None
    baseline_draws: Draws | None = None
    policy: Model | None = None
    other: Model | None = None
    scorer: Scorer | None = None
    bound: float | None = None
    temperature: float | None = 1.0
    _kept: dict[str, list[Rollout]] = field(default_factory=dict)

    def rollouts(self, n: int) -> list[Rollout]:
        return self._once("policy", self.draws, n)

    def baseline(self, n: int) -> list[Rollout]:
        return self._once("baseline", self.baseline_draws, n)

    def _once(self, name: str, draws: Draws | None, n: int) -> list[Rollout]:
        if draws is None:
            raise ConfigError(f"a task asks for samples of the {name}, but there is none to sample from")
        kept = self._kept.get(name)
        if kept is None or len(kept[0].completions) < n:
            kept = self._kept[name] = draws(n)
        return [replace(group, completions=group.completions[:n]) for group in kept]

    def log_ratios(self, rollouts: List[Rollout]) -> list[list[float]] | None:
        if self.policy is None or self.other is None or self.temperature is None:
            return None
        above, below = self._logps(self.policy, rollouts), self._logps(self.other, rollouts)
        return [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(above, below, strict=True)]

    def _logps(self, model: Model, rollouts: List[Rollout]) -> list[list[float]]:
        tokens: list[Tokens] = []
        groups: list[int] = []
        for i, group in enumerate(rollouts):
            tokens += [self.renderer.tokens(group.prompt, completion) for completion in group.completions]
            groups += [i] * len(group.completions)
        reader = Resident(Module(model.network), model.device, TOKEN_BUDGET, temperature=self.temperature or 1.0)
        found = reader.logps(tokens, groups)
        sums = iter([float(x.double().sum()) for x in found])
        return [[next(sums) for _ in group.completions] for group in rollouts]

    def mean_logps(self, rollouts: List[Rollout]) -> list[list[float | None]] | None:
        if self.policy is None:
            return None
        found: list[list[float | None]] = []
        reader, limit = Resident(Module(self.policy.network), self.policy.device, TOKEN_BUDGET), self.policy.positions
        for group in rollouts:
            tokens = [self.renderer.tokens(group.prompt, completion) for completion in group.completions]
            fits = [limit is None or len(t) <= limit for t in tokens]
            logps = iter(reader.logps([t for t, ok in zip(tokens, fits, strict=True) if ok], [0] * sum(fits)))
            found.append([float(next(logps).double().mean()) if ok else None for ok in fits])
        return found

    def kl_bound(self) -> float | None:
        return self.bound

    def scores(self, rollouts: List[Rollout]) -> list[list[float]] | None:
        if self.scorer is None:
            return None
        return [[_number(score) for score in scores] for scores in self.scorer(rollouts)]

    def reward(self, source: RewardSource) -> Scorer:
        return source.open(self.services)

    def judge(self, judge: Judge) -> Comparer:
        return judge.open(self.services)


def _number(score: Score) -> float:
    """A missing score stops the measurement: dropped, it would shift those behind it."""
    if score.value is None:
        raise ConfigError(f"a reply could not be scored: {score.reason}")
    return score.value
