"""Methods that make preferences or targets of samples and their scores: RAFT, online DPO, Nash-MD, XPO, REBEL, A*-PO.

Where a paper has a preference model and we have scores, the preference is Bradley and Terry's: σ of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as List
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from prefopt.api import (
    Batch,
    Draw,
    Loss,
    Needs,
    Policy,
    Role,
    RolloutAlgorithm,
    Row,
    Sequence,
    StepContext,
)
from prefopt.maths import preference_nll, stop_gradient
from prefopt_online.arrange import best_and_worst, pair, preferred, rollouts, samples, with_fields
from prefopt_online.reinforce import NO_RATIO, ScoreFunction

if TYPE_CHECKING:
    from torch import Tensor

RHO = "ρ = log π(y)/π_ref(y)"
DROPPED = "Pairs of equal scores and pairs of the same completion are left out."


class RAFT(RolloutAlgorithm):
    """Reward-ranked fine-tuning, expert iteration: imitate the best of several samples."""

    name = "raft"
    paper = "Dong et al. 2023, arXiv:2304.06767"
    formula = "L = mean_t of -log π(y_t),   y = the best of n samples"
    dialect = "The mean over all tokens. Of equal scores the first is taken."
    moves = (1, None)
    differences: ClassVar[tuple[str, ...]] = (
        "The paper collects the best of many prompts and then trains an epoch on them: `minibatches` does that.",
    )

    n: PositiveInt = 8
    """Samples for each prompt."""

    def needs(self) -> Needs:
        return Needs(draws=(Draw(self.n),))

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        found = [(group, row, best_and_worst(row)) for group, row in rollouts(rows)]
        return [
            sequence
            for group, row, ends in found
            if ends is not None
            for sequence in row.select([row.completions.index(ends[0])]).sequences(group)
        ]

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        return Loss(batch.mean(-policy.logps, "tokens"))


class OnlinePairs(RolloutAlgorithm):
    """The loss of DPO on pairs of samples."""

    dialect = f"{DROPPED} Log-ratios are sums over tokens."

    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference."""

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        reward = self.beta * batch.sum_tokens(policy.logps - batch.reference_logps)
        chosen, rejected = batch.pairs(reward)
        return Loss(batch.mean(preference_nll(chosen - rejected), "pairs"), batch.pair_metrics(reward))


class OnlineDPO(OnlinePairs):
    """Online DPO: DPO on two samples of the policy in training, the one that scores higher being chosen."""

    name = "online_dpo"
    paper = "Guo et al. 2024, arXiv:2402.04792"
    formula = f"L = -log σ(β (ρ_w - ρ_l)),   {RHO},   of two samples w scores higher"
    differences: ClassVar[tuple[str, ...]] = ("TRL 1.16 takes the first of two equal scores for the better.",)

    n: int = Field(2, ge=2)
    """Samples for each prompt; the best is compared with the worst."""

    def needs(self) -> Needs:
        return Needs(draws=(Draw(self.n),), before={"reference_logps"})

    def loss_at_init(self) -> float:
        return math.log(2)

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        found = [(group, row, best_and_worst(row)) for group, row in rollouts(rows)]
        return [s for group, row, ends in found if ends is not None for s in preferred(row, group, *ends)]


class IterativeDPO(OnlineDPO):
    """Iterative DPO: the best of n samples against the worst. With `reference: {every: K, mix: 1.0}` each K steps are a
    round, which begins at the policy that the last one ended with."""

    name = "iterative_dpo"
    paper = "Xiong et al. 2023, arXiv:2312.11456"
    formula = f"L = -log σ(β (ρ_w - ρ_l)),   {RHO},   w the best and l the worst of n samples"
    differences: ClassVar[tuple[str, ...]] = ("OpenRLHF had it as a script over files, one for each round.",)

    n: int = Field(8, ge=2)
    """Samples for each prompt; the best is compared with the worst."""


class XPO(OnlinePairs):
    """Exploratory preference optimization: DPO on a sample of the policy and one of the reference, with a bonus for
    leaving what the reference would say."""

    name = "xpo"
    paper = "Xie et al. 2024, arXiv:2405.21046, algorithm 1"
    formula = f"L = -log σ(β (ρ_w - ρ_l)) + α log π(y'),   y' the reference's sample,   {RHO}"
    moves = (1, None)
    differences: ClassVar[tuple[str, ...]] = ("TRL's, gone since 1.16, asked a judge; here scores decide.",)

    alpha: PositiveFloat = 1e-5
    """α, the weight of the bonus."""

    def needs(self) -> Needs:
        draws = (Draw(), Draw(source="reference", role=Role.OPPONENT))
        return Needs(draws=draws, rows=frozenset({"reference"}), before={"reference_logps"})

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        return [
            with_fields(sequence, reference=float(sequence.completion is theirs))
            for group, row in rollouts(rows)
            for own, theirs in zip(row.of(Role.SAMPLE)[:1], row.of(Role.OPPONENT), strict=False)
            for sequence in preferred(row, group, own, theirs)
        ]

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        preference = super().loss(batch, policy)
        bonus = batch.sum_tokens(policy.logps) * batch.reference
        chosen, rejected = batch.pairs(bonus)
        return Loss(preference.value + self.alpha * batch.mean(chosen + rejected, "pairs"), preference.metrics)


class NashMD(ScoreFunction):
    """Nash mirror descent: towards a policy that no other is preferred to, by playing against a mixture of itself and
    the reference."""

    name = "nash_md"
    paper = "Munos et al. 2023, arXiv:2312.00886"
    formula = "L = -(P(y > y') - ½ - β log(π/π_ref)) log π(y),   y' of the mixture,   P = σ((score - score') / T)"
    dialect = f"The mixture is geometric, token by token. {NO_RATIO}"
    differences: ClassVar[tuple[str, ...]] = (
        "TRL's, gone since 1.16, took KL token by token; here a completion pays for all of its own, as in the paper.",
        "The paper's preference model compares; here scores do, through a Bradley-Terry model of temperature T.",
    )

    beta: float = Field(0.1, ge=0)
    """The price of a nat of KL divergence from the reference; 0: no reference is needed in the loss."""
    mix: float = Field(0.5, ge=0, le=1)
    """The reference's share of the mixture."""
    temperature: PositiveFloat = 1.0
    """T: the difference of scores at which the better is preferred with probability 0.73."""

    def needs(self) -> Needs:
        own = super().needs()
        draws = (*own.draws, Draw(source="mixture", mix=self.mix, role=Role.OPPONENT))
        return Needs(draws=draws, rows=frozenset({"score", "opponent"}), before=own.before)

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        """The samples, each with its opponent's score; none where that is missing."""
        return [
            with_fields(sequence, opponent=opponent.score)
            for group, row in rollouts(rows)
            for opponent in row.of(Role.OPPONENT)[:1]
            for sequence in samples(row, group)
        ]

    def worth(self, batch: Batch) -> Tensor:
        return ((batch.score - batch.opponent) / self.temperature).sigmoid()

    def advantage(self, batch: Batch, reward: Tensor, ctx: StepContext) -> Tensor:
        return reward - 0.5


class REBEL(RolloutAlgorithm):
    """REBEL: regress the difference of two samples' rewards on the difference of their log-ratios."""

    name = "rebel"
    paper = "Gao et al. 2024, arXiv:2404.16767"
    formula = "L = ((x_1 - x_2) / η - (score_1 - score_2))²,   x = log π(y)/π_old(y)"
    dialect = "π_old is the policy that drew the samples. Equal scores hold two samples together; they are kept."
    differences: ClassVar[tuple[str, ...]] = ("The authors take several updates with the samples of a step.",)

    eta: PositiveFloat = 1.0
    """η, the step: a difference of 1 in score moves log-ratios apart by η."""

    def needs(self) -> Needs:
        before = frozenset[str]() if self.on_policy else frozenset({"old_logps"})
        return Needs(draws=(Draw(2),), rows=frozenset({"score"}), before=before)

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        pairs = [(group, row, row.of(Role.SAMPLE)) for group, row in rollouts(rows)]
        return [s for group, row, drawn in pairs if len(drawn) == 2 for s in pair(row, group, *drawn)]

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        old = stop_gradient(policy.logps) if self.on_policy else batch.old_logps
        moved = batch.sum_tokens(policy.logps - old)
        (one, other), (better, worse) = batch.pairs(moved), batch.pairs(batch.score)
        missed = (one - other) / self.eta - (better - worse)
        return Loss(batch.mean(missed.square(), "pairs"), batch.pair_metrics(moved))


class AStarPO(RolloutAlgorithm):
    """A*-PO: the best value that KL allows is estimated from samples of the reference; log-ratios are then regressed on
    how far a sample is above it."""

    name = "a_star_po"
    paper = "Brantley et al. 2025, arXiv:2505.20686"
    formula = f"L = (β₂ ρ - (score - V*))²,   V* = β₁ log mean of exp(score / β₁) over the reference's samples,   {RHO}"
    dialect = "The reference's samples are drawn in the same step; the paper draws them once, before training."
    moves = (None, None)
    differences: ClassVar[tuple[str, ...]] = ("TRL's experimental `a2po` has the same defaults.",)

    n: PositiveInt = 8
    """Samples of the reference for each prompt."""
    value_beta: PositiveFloat = 0.5
    """β₁: how much better than its mean the best of the reference counts as within reach; small: all of it."""
    beta: PositiveFloat = 1e-3
    """β₂: how strongly the policy is held to the reference."""

    def needs(self) -> Needs:
        draws = (Draw(), Draw(self.n, source="reference", role=Role.OPPONENT))
        return Needs(draws=draws, rows=frozenset({"score", "value"}), before={"reference_logps"})

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        """The samples, each with V*; none where no sample of the reference has a score."""
        return [
            with_fields(sequence, value=self._value([c.score for c in row.of(Role.OPPONENT) if c.score is not None]))
            for group, row in rollouts(rows)
            if row.of(Role.OPPONENT)
            for sequence in samples(row, group)
        ]

    def _value(self, scores: List[float]) -> float:
        top = max(scores)
        mean = sum(math.exp((score - top) / self.value_beta) for score in scores) / len(scores)
        return top + self.value_beta * math.log(mean)

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        moved = batch.sum_tokens(policy.logps - batch.reference_logps)
        above = batch.score - batch.value
        metrics = {"advantage/mean": above, "kl/sequence": moved.detach()}
        value = batch.mean((self.beta * moved - above).square(), "sequences")
        return Loss(value, {name: batch.mean(x, "sequences", weighted=False) for name, x in metrics.items()})
