"""What the methods of this plugin share: pairs of plain log-probabilities, and the chosen side's likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from prefopt.api import Algorithm, Batch, Comparison, Loss, Needs, Policy

if TYPE_CHECKING:
    from torch import Tensor


class FreeMethod(Algorithm):
    """A loss of the rewards of a pair, which need no reference model. A method overrides `reward` and `pair_loss`.

    `nll_weight` is the weight of the chosen side's likelihood, one mean over the step's chosen tokens.
    """

    eats = Comparison

    beta: PositiveFloat = 0.1
    """The scale of the reward."""

    def needs(self) -> Needs:
        return Needs(during=frozenset({"logps"}))

    @property
    def nll_weight(self) -> float:
        return 0.0

    def reward(self, batch: Batch, policy: Policy) -> Tensor:
        """The reward of each sequence. [N]"""
        return self.beta * batch.sum_tokens(policy.logps)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair from its rewards. [P], [P] -> [P]"""
        raise NotImplementedError(f"write {type(self).__name__}.pair_loss")

    def likelihood(self, batch: Batch, policy: Policy) -> Tensor:
        """The negative log-likelihood of the step's chosen sides, of one token."""
        return -batch.mean(policy.logps, "chosen_tokens")

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        reward = self.reward(batch, policy)
        value = batch.mean(self.pair_loss(*batch.pairs(reward)), "pairs")
        nll = self.likelihood(batch, policy)
        metrics = batch.pair_metrics(reward) | {"loss/nll": nll.detach()}
        return Loss(value + self.nll_weight * nll if self.nll_weight else value, metrics)
