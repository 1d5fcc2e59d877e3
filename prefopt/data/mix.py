"""A second source joined to each step: its rows become demonstrations whose likelihood is added to the loss.

They are a batch of their own, so that the method never sees them and no mean of it counts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.batch import Batch, Loss, Needs, Policy
from prefopt.components import Algorithm
from prefopt.data.assemble import Assembled, Assembler
from prefopt.data.streams import Order
from prefopt.rows import Demonstration, Row


class MixedLikelihood(Algorithm):
    """The likelihood of demonstrations beside another method. Ouyang et al. 2022, arXiv:2203.02155, eq. 2."""

    name = "mix"
    eats: ClassVar[type[Row]] = Demonstration
    formula = "L = - weight * Σ_t log π(y_t | x, y_<t) / number of completion tokens mixed into the step"

    weight: float = 1.0
    """What the mean negative log-likelihood per token is multiplied with."""

    def needs(self) -> Needs:
        return Needs(during=frozenset({"logps"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        nll = -batch.mean(policy.logps, "tokens")
        return Loss(self.weight * nll, {"loss/nll": nll})


@dataclass(frozen=True)
class Mix:
    """What is joined to each step. Its order has its own stream, so the first source's is the same with and without."""

    assembler: Assembler
    order: Order

    @property
    def algorithm(self) -> Algorithm:
        return self.assembler.algorithm

    def step(self, step: int) -> Assembled | None:
        """The demonstrations of global step `step`; None when none of them can be used."""
        return self.assembler(self.order.step(step))

    def seen(self, steps: int) -> set[int]:
        """The rows that the first `steps` steps use."""
        once = min(steps, self.order.steps_per_epoch)
        return {i for step in range(once) for i in self.order.step(step)}
