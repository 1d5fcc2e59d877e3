"""Methods that compare a sample with the other samples of its prompt, and clip a ratio: RLOO, GRPO and its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from prefopt.api import Batch, Rollout, StepContext
from prefopt.maths import group_centred, group_std, leave_one_out
from prefopt_online.base import EACH, RATIO, TOKENS, Clipped, SampleMethod, mean_of_means, mean_of_tokens

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-4
"""Added to a standard deviation that divides."""


class RLOO(Clipped):
    """REINFORCE leave-one-out: each sample against the mean of the other samples of its prompt."""

    name = "rloo"
    paper = "Ahmadian et al. 2024, arXiv:2402.14740"
    formula = "L = max(-A r, -A clip(r, 1-ε, 1+ε)),   A = R - mean of the others' R,   R = score - β log(π/π_ref)"
    dialect = "r is the ratio of a whole completion; on the samples of the step's own policy this is REINFORCE."
    paid = "reward"
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16 computes the same with 2 samples and beta 0.05.",
        "verl and OpenRLHF clip the ratio of a token.",
    )

    n: int = Field(4, ge=2)
    """Samples for each prompt."""
    beta: float = Field(0.05, ge=0)
    """The price of a nat of KL divergence from the reference; 0: no reference is needed."""

    def loss_at_init(self) -> float:
        return 0.0

    def advantage(self, batch: Batch, reward: Tensor, ctx: StepContext) -> Tensor:
        return leave_one_out(reward, batch.group)

    def compared(self, batch: Batch, log_ratio: Tensor) -> Tensor:
        return batch.sum_tokens(log_ratio)[:, None]


class GroupAdvantage(SampleMethod):
    """The advantage of GRPO: above the mean of the group, in its standard deviations."""

    scale: Literal["std", "population_std", "none"] = "std"
    """What divides: the group's standard deviation with ddof 1 or ddof 0, plus 1e-4, or nothing."""

    def advantage(self, batch: Batch, reward: Tensor, ctx: StepContext) -> Tensor:
        centred = group_centred(reward, batch.group)
        ctx.record("reward/equal_groups", (group_std(reward, batch.group, 0) == 0).to(reward).mean())
        if self.scale == "none":
            return centred
        return centred / (group_std(reward, batch.group, ddof=int(self.scale == "std")) + EPS)


class GroupMethod(GroupAdvantage, Clipped):
    """GRPO's advantage and a ratio with a clip, completion by completion."""

    def aggregate(self, batch: Batch, x: Tensor) -> Tensor:
        return mean_of_means(batch, x)


STANDARDISED = "A = (R - mean) / (std + 1e-4) in the group"


class GRPO(GroupMethod):
    """Group relative policy optimization, as published: no critic, the group is the baseline."""

    name = "grpo"
    paper = "Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4"
    formula = f"L = mean of max(-A r_t, -A clip(r_t, 1-ε, 1+ε)) + β k3_t,   {STANDARDISED},   {RATIO}"
    dialect = f"{EACH} The standard deviation has ddof 1."
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16's GRPO aggregates as `dapo` unless `loss_type` is `grpo`; its beta is 0, and the ratio weighs KL.",
        "verl adds 1e-6 to the standard deviation, OpenRLHF 1e-9, HALOs 1e-2 to one with ddof 0.",
        "NeMo-RL leaves the sample itself out of mean and standard deviation by default.",
    )

    beta: float = Field(0.04, ge=0)
    """The price of a nat of KL divergence from the reference; 0: no reference is needed."""

    def loss_at_init(self) -> float | None:
        return 0.0


class DrGRPO(GroupMethod):
    """Dr. GRPO: GRPO without its two biases, towards questions of little spread and towards long wrong answers."""

    name = "dr_grpo"
    paper = "Liu et al. 2025, arXiv:2503.20783"
    formula = f"L = 1/(N M) Σ_i Σ_t max(-A r_t, -A clip(r_t, 1-ε, 1+ε)),   A = R - mean of the group,   {RATIO}"
    dialect = "M is a constant, `length`; it scales the loss and nothing else."
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16 takes the longest completion that may be drawn for M; verl's snapshot did not divide by N.",
    )

    scale: Literal["std", "population_std", "none"] = "none"
    """What divides: the group's standard deviation with ddof 1 or ddof 0, plus 1e-4, or nothing."""
    length: PositiveInt = 64
    """M, what the sum over a completion's tokens is divided by: the most tokens that are drawn."""

    def aggregate(self, batch: Batch, x: Tensor) -> Tensor:
        return batch.mean(batch.sum_tokens(x) / self.length, "sequences")


class BNPO(GroupMethod):
    """GRPO with the mean over all tokens of a minibatch instead of completion by completion."""

    name = "bnpo"
    paper = "TRL's `loss_type: bnpo`; arXiv:2506.02864, of the same name, is another method"
    formula = f"L = mean_t of max(-A r_t, -A clip(r_t, 1-ε, 1+ε)) + β k3_t,   {STANDARDISED},   {RATIO}"
    dialect = TOKENS
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16 takes the mean over a microbatch, so that its loss depends on how a batch is cut.",
    )

    beta: float = Field(0.04, ge=0)
    """The price of a nat of KL divergence from the reference; 0: no reference is needed."""

    def aggregate(self, batch: Batch, x: Tensor) -> Tensor:
        return mean_of_tokens(batch, x)


class DAPO(GroupMethod):
    """Decoupled clip and dynamic sampling: GRPO that looks for groups to learn from, lets rare tokens rise further and
    weighs every token the same."""

    name = "dapo"
    paper = "Yu et al. 2025, arXiv:2503.14476, eq. 8 to 13"
    formula = f"L = mean_t of max(-A r_t, -A clip(r_t, 1-ε, 1+ε_high)),   {STANDARDISED},   {RATIO}"
    dialect = f"{TOKENS} A group whose scores are all equal is replaced by another prompt's, a few times."
    act_elsewhere: ClassVar[frozenset[str]] = Clipped.act_elsewhere | {"dynamic_sampling"}
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16's `dapo` is the mean over tokens alone: it draws no other prompts.",
        "The authors' code asks for accuracies between 0 and 1; here any two scores that differ will do.",
    )

    clip_high: PositiveFloat | None = 0.28
    """ε above, as `clip` if not given."""
    dynamic_sampling: bool = True
    """Draw for other prompts when all samples of one score the same."""
    overlong: PositiveInt | None = None
    """The length, in tokens, at which 1 has been taken from a completion's score; not given, length costs nothing."""
    cushion: PositiveInt | None = None
    """Over how many tokens before it the score falls; a fifth of `overlong` if not given."""

    @model_validator(mode="after")
    def _a_cushion_lies_before_the_end(self) -> DAPO:
        if self.cushion is not None and self.cushion > (self.overlong or 0):
            raise ValueError("cushion counts tokens before overlong: set that, to no less than it")
        return self

    def keep(self, group: Rollout) -> bool:
        return not self.dynamic_sampling or len({c.score for c in group.completions}) > 1

    def worth(self, batch: Batch) -> Tensor:
        if self.overlong is None:
            return batch.score
        cushion = self.cushion or self.overlong / 5
        over = (batch.lengths.to(batch.score) - (self.overlong - cushion)) / cushion
        return batch.score - over.clamp(0, 1)

    def aggregate(self, batch: Batch, x: Tensor) -> Tensor:
        return mean_of_tokens(batch, x)
