"""REINFORCE with four baselines: a running mean, the mean of the step, the group and the step, a greedy reply."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from prefopt.api import Batch, Draw, Needs, Policy, Role, Row, Sequence, StepContext, lazy_import
from prefopt.maths import at_last, discounted_returns, group_centred, whiten
from prefopt_online.arrange import rollouts, samples, with_fields
from prefopt_online.base import RATIO, SUMMED, TOKENS, Clipped, SampleMethod, mean_of_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

NO_RATIO = "There is no ratio: with more than one update in a step the later ones are biased."


class ScoreFunction(SampleMethod):
    """`L = -A log π(y)`, the score-function gradient itself; KL is paid in the reward."""

    paid = "reward"
    moves: ClassVar[tuple[int | None, int | None]] = (None, None)

    n: PositiveInt = 1
    """Samples for each prompt."""
    beta: float = Field(0.05, ge=0)
    """The price of a nat of KL divergence from the reference; 0: no reference is needed."""

    @property
    def reads_old(self) -> bool:
        return False

    def objective(self, batch: Batch, policy: Policy, log_ratio: Tensor) -> Tensor:
        return -batch.advantages * policy.logps

    def moved(self, batch: Batch, log_ratio: Tensor) -> dict[str, Tensor]:
        return {}


class Reinforce(ScoreFunction):
    """REINFORCE: the log-probability of a sample, weighed by how much better it is than samples have been so far."""

    name = "reinforce"
    paper = "Williams 1992, with reinforcement comparison; for language models Ahmadian et al. 2024, arXiv:2402.14740"
    formula = "L = -(R - b) log π(y),   R = score - β log(π/π_ref),   b ← m b + (1-m) mean R"
    dialect = f"b is that of the steps before; in the first it is 0. {SUMMED} {NO_RATIO}"
    differences: ClassVar[tuple[str, ...]] = ("Ahmadian et al. take the plain mean of all steps before for b.",)

    memory: float = Field(0.9, ge=0, lt=1)
    """m: how slowly the baseline follows."""

    def advantage(self, batch: Batch, reward: Tensor, ctx: StepContext) -> Tensor:
        baseline, kept = ctx.state.get("reinforce/baseline"), self.memory
        mean = reward.mean().double()
        ctx.state["reinforce/baseline"] = mean if baseline is None else kept * baseline + (1 - kept) * mean
        return reward if baseline is None else reward - baseline.to(reward)


class ReMax(ScoreFunction):
    """ReMax: the reply of greatest probability, token by token, is the baseline."""

    name = "remax"
    paper = "Li et al. 2023, arXiv:2310.10505"
    formula = "L = -(R - score of the greedy reply) log π(y),   R = score - β log(π/π_ref)"
    dialect = f"The greedy reply is scored and not trained on; no KL is paid for it. {SUMMED} {NO_RATIO}"
    differences: ClassVar[tuple[str, ...]] = ("verl's estimator is the same with returns of tokens.",)

    def needs(self) -> Needs:
        own = super().needs()
        draws = (*own.draws, Draw(greedy=True, role=Role.OPPONENT))
        return Needs(draws=draws, rows=frozenset({"score", "baseline"}), before=own.before)

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        """The samples, each with the greedy reply's score; none where that is missing."""
        return [
            with_fields(sequence, baseline=greedy.score)
            for group, row in rollouts(rows)
            for greedy in row.of(Role.OPPONENT)[:1]
            for sequence in samples(row, group)
        ]

    def advantage(self, batch: Batch, reward: Tensor, ctx: StepContext) -> Tensor:
        return reward - batch.baseline


class ReinforcePlusPlus(Clipped):
    """REINFORCE++: PPO's tricks without its critic. What follows a token, whitened over the whole step."""

    name = "reinforce_plus_plus"
    paper = "Hu et al. 2025, arXiv:2501.03262"
    formula = f"L = mean_t of max(-A_t r_t, -A_t clip(r_t, 1-ε, 1+ε)),   A = whitened Σ_s≥t reward_s,   {RATIO}"
    dialect = f"reward_s = [s last] score - β log(π/π_ref)_s, when KL is paid in the reward. {TOKENS}"
    paid: ClassVar[Literal["reward", "loss"]] = "reward"
    moves: ClassVar[tuple[int | None, int | None]] = (None, None)
    differences: ClassVar[tuple[str, ...]] = ("OpenRLHF limits the log-ratio to ±10 and clips the score to ±10.",)

    n: PositiveInt = 1
    """Samples for each prompt."""
    beta: float = Field(0.01, ge=0)
    """The price of a nat of KL divergence from the reference; 0: no reference is needed."""

    def reward(self, batch: Batch, ctx: StepContext) -> Tensor:
        super().reward(batch, ctx)  # for what it records
        return batch.score

    def advantage(self, batch: Batch, reward: Tensor, ctx: StepContext) -> Tensor:
        rewards = at_last(self.above(batch, reward), batch.mask)
        if self.charged == "reward":
            rewards = rewards - self.beta * (batch.old_logps - batch.reference_logps)
        return whiten(discounted_returns(rewards, batch.mask), batch.mask)

    def above(self, batch: Batch, reward: Tensor) -> Tensor:
        """The score of each sample, less a baseline. [N]"""
        return reward

    def aggregate(self, batch: Batch, x: Tensor) -> Tensor:
        return mean_of_tokens(batch, x)


class ReinforcePlusPlusBaseline(ReinforcePlusPlus):
    """REINFORCE++ with several samples of a prompt, whose mean is subtracted before the step is whitened."""

    name = "reinforce_plus_plus_baseline"
    paper = "Hu et al. 2025, arXiv:2501.03262"
    formula = (
        f"L = mean_t of max(-A r_t, -A clip(r_t, 1-ε, 1+ε)) + β k2_t,   A = whitened (R - mean of group),   {RATIO}"
    )
    dialect = f"Whitening counts tokens, so that long completions weigh more. {TOKENS}"
    paid: ClassVar[Literal["reward", "loss"]] = "loss"
    estimated = "k2"
    moves: ClassVar[tuple[int | None, int | None]] = (None, None)
    differences: ClassVar[tuple[str, ...]] = ("OpenRLHF's `reinforce_baseline` is the same with its clips of ±10.",)

    n: PositiveInt = 8
    """Samples for each prompt."""

    def above(self, batch: Batch, reward: Tensor) -> Tensor:
        return group_centred(reward, batch.group)
