"""What the methods of this plugin share: a pair's implicit rewards, and a loss of the two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from prefopt.api import Algorithm, Batch, Comparison, Loss, Needs, Policy

if TYPE_CHECKING:
    from torch import Tensor

RATIO = "ρ = Σ_t [ log π(y_t) - log π_ref(y_t) ]"
SUMMED = "Log-probabilities are summed over the completion, its end-of-sequence token included; the mean over pairs."


class PairMethod(Algorithm):
    """A loss of the implicit rewards `r = β ρ` of a pair, ρ being the log-ratio of policy and reference.

    A method overrides `pair_loss` when it only shapes the loss, `log_ratio` when it measures a completion in another
    way, and `loss` when a pair needs more than its two rewards.
    """

    eats = Comparison
    dialect = SUMMED

    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference: the temperature of the implicit reward."""

    def needs(self) -> Needs:
        return Needs(before={"reference_logps"}, during=frozenset({"logps"}))

    def log_ratio(self, batch: Batch, policy: Policy) -> Tensor:
        """ρ of each sequence. [N]"""
        return batch.sum_tokens(policy.logps - batch.reference_logps)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair from its rewards r_w, r_l. [P], [P] -> [P]"""
        raise NotImplementedError(f"write {type(self).__name__}.pair_loss")

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        reward = self.beta * self.log_ratio(batch, policy)
        chosen, rejected = batch.pairs(reward)
        return Loss(batch.mean(self.pair_loss(chosen, rejected), "pairs"), batch.pair_metrics(reward))
