"""The logistic loss of other margins: by length, by what a judge says, by what the chosen side has lost."""

from __future__ import annotations

import math
from collections.abc import Sequence as List
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat

from prefopt.api import Batch, Comparison, DataError, Loss, Needs, Policy, Row, Sequence, lazy_import
from prefopt.maths import preference_nll
from prefopt_dpo.base import RATIO, PairMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class LengthNormalisedDPO(PairMethod):
    """Length-normalised DPO: the rewards are means over tokens."""

    name = "dpo_norm"
    paper = "Lambert et al. 2024, arXiv:2411.15124 (Tülu 3)"
    formula = f"L = - log σ(β [ρ_w / |y_w| - ρ_l / |y_l|]),   {RATIO}"
    dialect = "Log-ratios are means over the completion's tokens; beta is 5, as in the paper."
    differences = ("TRL 1.16 (`sigmoid_norm`) and open-instruct (`dpo_norm`) compute the same; TRL's beta is 0.1.",)

    beta: PositiveFloat = 5.0
    """How strongly the policy is held to the reference, for log-ratios of one token."""

    def loss_at_init(self) -> float:
        return math.log(2)

    def log_ratio(self, batch: Batch, policy: Policy) -> Tensor:
        return batch.mean_tokens(policy.logps - batch.reference_logps)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_nll(chosen - rejected)


class OffsetMethod(PairMethod):
    """The logistic loss of a margin from which something is taken away."""

    def offset(self, batch: Batch, reward: Tensor) -> Tensor:
        """What is taken from each pair's margin. [P]"""
        raise NotImplementedError(f"write {type(self).__name__}.offset")

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        reward = self.beta * self.log_ratio(batch, policy)
        chosen, rejected = batch.pairs(reward)
        nll = preference_nll(chosen - rejected - self.offset(batch, reward))
        return Loss(batch.mean(nll, "pairs"), batch.pair_metrics(reward))


class LengthRegularisedDPO(OffsetMethod):
    """R-DPO: part of a preference for the longer completion is explained by its length."""

    name = "r_dpo"
    paper = "Park et al. 2024, arXiv:2403.19159"
    formula = f"L = - log σ(β (ρ_w - ρ_l) + α (|y_w| - |y_l|)),   {RATIO}"
    differences = ("No framework read here has it. The formula is the paper's, not compared with its authors' code.",)

    alpha: float = Field(0.01, gt=0)
    """α, the reward that a token is believed to have earned by itself."""

    def offset(self, batch: Batch, reward: Tensor) -> Tensor:
        chosen, rejected = batch.pairs(batch.lengths)
        return -self.alpha * (chosen - rejected).to(reward)


class OffsetDPO(OffsetMethod):
    """ODPO: DPO with an offset that grows with how much better the chosen side is said to be."""

    name = "odpo"
    paper = "Amini et al. 2024, arXiv:2402.10571, with f = log"
    formula = f"L = - log σ(β (ρ_w - ρ_l) - α log(score_w - score_l)),   {RATIO}"
    dialect = f"The difference of scores is the row's `margin`, which must be positive. {PairMethod.dialect}"
    differences = ("No framework read here has it. The formula is the paper's, not compared with its authors' code.",)

    alpha: float = Field(1.0, gt=0)
    """α, how much the offset counts."""

    def needs(self) -> Needs:
        return Needs(rows=frozenset({"margin"}), before={"reference_logps"}, during=frozenset({"logps"}))

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        for row in rows:
            if isinstance(row, Comparison) and row.margin is not None and row.margin <= 0:
                raise DataError(
                    f"odpo takes the logarithm of a row's margin, and this one's is {row.margin:g}",
                    fix="Leave such rows out, or use a method that does not read margins.",
                )
        return super().arrange(rows)

    def offset(self, batch: Batch, reward: Tensor) -> Tensor:
        return self.alpha * torch.log(batch.pairs(batch.margin)[0])


class DPOPositive(OffsetMethod):
    """DPO-Positive (Smaug): pairs count as lost while the chosen side is less likely than under the reference."""

    name = "dpo_positive"
    paper = "Pal et al. 2024, arXiv:2402.13228"
    formula = f"L = - log σ(β (ρ_w - ρ_l - λ max(0, -ρ_w))),   {RATIO}"
    differences = ("No framework read here has it; not compared with its authors' code. The paper's λ is 50 at β 0.3.",)

    penalty: float = Field(5.0, gt=0)
    """λ, the weight of what the chosen side has lost."""

    def loss_at_init(self) -> float:
        return math.log(2)

    def offset(self, batch: Batch, reward: Tensor) -> Tensor:
        return self.penalty * torch.relu(-batch.pairs(reward)[0])
