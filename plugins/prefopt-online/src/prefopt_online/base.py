"""What the methods share that learn from samples by their advantage: the draw, the divergence, what is idle.

A method says its advantage and its objective; how an objective becomes one number is one of four aggregations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from prefopt.api import Batch, Draw, Loss, Needs, Policy, RolloutAlgorithm, StepContext
from prefopt.maths import clipped_surrogate, importance_weight, kl_estimate, outside_clip, stop_gradient

if TYPE_CHECKING:
    from torch import Tensor

RATIO: Final = "r_t = π(y_t) / π_old(y_t)"
EACH: Final = "The mean over completions of the mean over a completion's tokens."
TOKENS: Final = "The mean over all tokens of a minibatch, whatever microbatches and ranks it is cut into."
SUMMED: Final = "The mean over completions of the sum over a completion's tokens."


class SampleMethod(RolloutAlgorithm):
    """`L = mean of objective(log-ratio, advantage) + β KL`: every token of a sample is made more likely by the sample's
    advantage, more or less."""

    paid: ClassVar[Literal["reward", "loss"]] = "loss"
    """Where KL is paid unless `kl_in` says otherwise."""
    estimated: ClassVar[Literal["k2", "k3"]] = "k3"
    """How KL in the loss is estimated unless `kl_estimator` says otherwise."""

    n: PositiveInt = 8
    """Samples for each prompt."""
    beta: NonNegativeFloat = 0.0
    """The price of a nat of KL divergence from the reference; 0: no reference is needed."""
    kl_in: Literal["reward", "loss"] | None = None
    """Where it is paid: in the reward of a sample, or as a term of the loss. Not given: as the paper does."""
    kl_estimator: Literal["k2", "k3"] | None = None
    """How KL in the loss is estimated; in the reward it is the log-ratio (k1)."""
    importance_cap: PositiveFloat | None = None
    """Weigh tokens by how likely they are to the trainer and the sampler, e^(difference), at most this."""

    @model_validator(mode="after")
    def _settings_that_belong_together(self) -> Self:
        if not self.beta and (self.kl_in or self.kl_estimator):
            raise ValueError("kl_in and kl_estimator mean nothing without beta: set it, or leave them out")
        if self.kl_estimator and self.charged == "reward":
            raise ValueError("kl_estimator is that of KL in the loss; in the reward it is always k1")
        return self

    @property
    def charged(self) -> Literal["reward", "loss"] | None:
        """Where KL is paid, if it is."""
        return (self.kl_in or self.paid) if self.beta else None

    @property
    def reads_old(self) -> bool:
        """Whether the loss compares with the policy that drew the samples."""
        return not self.on_policy

    def needs(self) -> Needs:
        wanted = {
            "reference_logps": self.charged is not None,
            "old_logps": self.reads_old or self.charged == "reward",
            "sampled_logps": self.importance_cap is not None,
        }
        before = {name for name, asked in wanted.items() if asked}
        return Needs(draws=(Draw(self.n),), rows=frozenset({"score"}), before=before)

    # --- what a method says ------------------------------------------------------------------------------------------

    def worth(self, batch: Batch) -> Tensor:
        """What a sample is worth before KL is paid: its score. [N]"""
        return batch.score

    def advantage(self, batch: Batch, reward: Tensor, ctx: StepContext) -> Tensor:
        """How much better than expected each sample was, [N], or each token, [N, T]; `reward` [N] has KL paid."""
        raise NotImplementedError(f"write {type(self).__name__}.advantage")

    def objective(self, batch: Batch, policy: Policy, log_ratio: Tensor) -> Tensor:
        """The loss of each token, [N, T], or of each completion, [N]; `batch.advantages` is [N, T]."""
        raise NotImplementedError(f"write {type(self).__name__}.objective")

    def aggregate(self, batch: Batch, x: Tensor) -> Tensor:
        """[N, T] -> one number."""
        return batch.mean(batch.sum_tokens(x), "sequences")

    # --- what follows ------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, ctx: StepContext) -> Batch:
        """`advantages` [N, T]."""
        reward = self.reward(batch, ctx)
        ctx.record("reward/total", reward.mean())
        found = self.advantage(batch, reward, ctx)
        return batch.with_columns(advantages=found if found.dim() == 2 else found[:, None].expand(batch.mask.shape))

    def reward(self, batch: Batch, ctx: StepContext) -> Tensor:
        """What a sample is worth, less what KL costs when it is paid in the reward. [N]"""
        if self.charged != "reward":
            return self.worth(batch)
        moved = batch.sum_tokens(batch.old_logps - batch.reference_logps)
        ctx.record("kl/sequence", moved.mean())
        ctx.record("kl/token", moved.sum() / batch.lengths.sum().clamp(min=1))
        return self.worth(batch) - self.beta * moved

    def old(self, batch: Batch, policy: Policy) -> Tensor:
        """Log-probabilities before the step: the policy's own, as constants, while it is the one that drew. [N, T]"""
        return batch.old_logps if self.reads_old else stop_gradient(policy.logps)

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        old = self.old(batch, policy)
        log_ratio = policy.logps - old
        each = self.objective(batch, policy, log_ratio)
        if self.importance_cap is not None:
            each = each * self._weight(batch, old - batch.sampled_logps, each.dim())
        value, metrics = self._reduced(batch, each), self.moved(batch, log_ratio.detach())
        if self.charged == "loss":
            away = policy.logps - batch.reference_logps
            value = value + self.beta * self.aggregate(batch, kl_estimate(away, self.kl_estimator or self.estimated))
            metrics["kl/token"] = batch.mean(away.detach(), "tokens", weighted=False)
            metrics["kl/sequence"] = batch.mean(batch.sum_tokens(away.detach()), "sequences", weighted=False)
        return Loss(value, metrics)

    def _weight(self, batch: Batch, gap: Tensor, dim: int) -> Tensor:
        assert self.importance_cap is not None
        return importance_weight(gap if dim == 2 else batch.sum_tokens(gap), self.importance_cap)

    def _reduced(self, batch: Batch, each: Tensor) -> Tensor:
        return self.aggregate(batch, each) if each.dim() == 2 else batch.mean(each, "sequences")

    def moved(self, batch: Batch, log_ratio: Tensor) -> dict[str, Tensor]:
        """How far this step's updates have gone: KL(old || new) of a token."""
        return {"kl/update": batch.mean(kl_estimate(-log_ratio, "k3"), "tokens", weighted=False)}

    def idle(self, batch: Batch) -> Tensor | None:
        """Samples without an advantage, where KL is not in the loss: all else is multiplied by it."""
        return None if self.charged == "loss" else ((batch.advantages == 0) | ~batch.mask).all(-1)


class Clipped(SampleMethod):
    """A method whose ratio counts up to a clip."""

    clip: float = Field(0.2, gt=0, lt=1)
    """ε: a ratio below 1 - ε, or above 1 + ε, has gone far enough."""
    clip_high: PositiveFloat | None = None
    """ε above, as `clip` if not given."""

    @property
    def high(self) -> float:
        """ε above."""
        return self.clip if self.clip_high is None else self.clip_high

    def moved(self, batch: Batch, log_ratio: Tensor) -> dict[str, Tensor]:
        beyond = outside_clip(self.compared(batch, log_ratio), batch.advantages, self.clip, self.high)
        share = batch.mean(beyond.to(log_ratio), "tokens", weighted=False)
        return {**super().moved(batch, log_ratio), "ratio/clipped": share}

    def compared(self, batch: Batch, log_ratio: Tensor) -> Tensor:
        """The log-ratio that is clipped: of a token, [N, T], by default; of a completion, [N, 1]."""
        return log_ratio

    def objective(self, batch: Batch, policy: Policy, log_ratio: Tensor) -> Tensor:
        compared = self.compared(batch, log_ratio)
        loss = clipped_surrogate(compared, batch.advantages[:, : compared.shape[1]], self.clip, self.high)
        return loss if compared is log_ratio else loss.squeeze(1)


def mean_of_means(batch: Batch, x: Tensor) -> Tensor:
    """`1/N Σ_i 1/|y_i| Σ_t x`: every completion weighs the same."""
    return batch.mean(batch.mean_tokens(x), "sequences")


def mean_of_tokens(batch: Batch, x: Tensor) -> Tensor:
    """`Σ_i Σ_t x / Σ_i |y_i|`: every token weighs the same."""
    return batch.mean(x, "tokens")
