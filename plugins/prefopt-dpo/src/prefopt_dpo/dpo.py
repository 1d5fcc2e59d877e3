"""DPO, the preference likelihood of an implicit reward, and what becomes of it when labels may be wrong."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from prefopt.maths import preference_nll
from prefopt_dpo.base import RATIO, PairMethod

if TYPE_CHECKING:
    from torch import Tensor


class DPO(PairMethod):
    """Direct Preference Optimization."""

    name = "dpo"
    paper = "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"
    formula = f"L = - log σ(r_w - r_l),   r = β ρ,   {RATIO}"
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16 accepts `label_smoothing` for its sigmoid loss and ignores it; here it is the conservative DPO of "
        "E. Mitchell's note.",
        "NeMo-RL's default beta is 0.05.",
    )

    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a label is the wrong way round (conservative DPO)."""

    def loss_at_init(self) -> float:
        return math.log(2)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_nll(chosen - rejected, self.label_smoothing)


class ConservativeDPO(DPO):
    """Conservative DPO (cDPO): DPO whose labels are wrong with a known probability."""

    name = "cdpo"
    paper = "E. Mitchell, A note on DPO with noisy preferences, 2023"
    formula = f"L = - (1-ε) log σ(r_w - r_l) - ε log σ(r_l - r_w),   r = β ρ,   {RATIO}"
    differences = ("TRL 1.16 has no such loss: its sigmoid loss ignores `label_smoothing`.",)

    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    """ε, the probability that a label is the wrong way round."""


class RobustDPO(PairMethod):
    """Robust DPO: an unbiased estimate of DPO's loss when labels are flipped with a known probability."""

    name = "robust_dpo"
    paper = "Chowdhury et al. 2024, arXiv:2403.00409"
    formula = f"L = [ - (1-ε) log σ(m) + ε log σ(-m) ] / (1 - 2ε),   m = β (ρ_w - ρ_l),   {RATIO}"
    differences = ("TRL 1.16 (`robust`) computes the same; its default ε is 0, which is DPO.",)

    label_smoothing: float = Field(0.1, gt=0, lt=0.5)
    """ε, the probability that a label is the wrong way round."""

    def loss_at_init(self) -> float:
        return math.log(2)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        kept, flipped = preference_nll(chosen - rejected), preference_nll(rejected - chosen)
        flip = self.label_smoothing
        return ((1 - flip) * kept - flip * flipped) / (1 - 2 * flip)
