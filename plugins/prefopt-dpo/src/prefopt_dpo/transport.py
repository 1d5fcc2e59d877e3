"""Alignment via optimal transport: the margins of a step, sorted, stand above those of the reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from prefopt.api import Batch, Loss, Policy, lazy_import
from prefopt.maths import preference_nll
from prefopt_dpo.base import RATIO, PairMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class AOTUnpaired(PairMethod):
    """AOT on unpaired data: the sorted rewards of chosen sides stand above the sorted rewards of rejected ones."""

    name = "aot_unpaired"
    paper = "Melnyk et al. 2024, arXiv:2406.05882, unpaired"
    formula = f"L = - log σ(β [sort(ρ_w) - sort(ρ_l)]),   over the pairs of a step,   {RATIO}"
    dialect = "Sorted over the whole step, whatever the microbatches and ranks. With one pair it is `dpo`."
    coupled: ClassVar[bool] = True
    differences = ("TRL 1.16 sorts each microbatch of each device by itself.",)

    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a label is the wrong way round."""

    def loss_at_init(self) -> float:
        return math.log(2)

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        ratio = self.log_ratio(batch, policy)
        upper, lower = self.sorted_against(batch, policy)
        nll = preference_nll(self.beta * (upper - matched(upper, lower)), self.label_smoothing)
        return Loss(batch.mean(nll, "pairs"), batch.pair_metrics(self.beta * ratio))

    def sorted_against(self, batch: Batch, policy: Policy) -> tuple[Tensor, Tensor]:
        """What is to stand above, and what below. [P], [P]"""
        return batch.pairs(self.log_ratio(batch, policy))


class AOT(AOTUnpaired):
    """Alignment via optimal transport, paired: sorted differences of log-probabilities, policy above reference."""

    name = "aot"
    paper = "Melnyk et al. 2024, arXiv:2406.05882, paired"
    formula = "L = - log σ(β [sort(s_w - s_l) - sort(s_w - s_l)_ref]),   s = Σ_t log π(y_t)"

    def sorted_against(self, batch: Batch, policy: Policy) -> tuple[Tensor, Tensor]:
        sides = (batch.pairs(batch.sum_tokens(logps)) for logps in (policy.logps, batch.reference_logps))
        own, theirs = (chosen - rejected for chosen, rejected in sides)
        return own, theirs


def matched(x: Tensor, others: Tensor) -> Tensor:
    """For each of `x` the one of `others` that has its place when both are sorted. [P], [P] -> [P]"""
    return others.sort().values[x.argsort(stable=True).argsort()]
