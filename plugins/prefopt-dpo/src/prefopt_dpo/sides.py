"""Losses that place each side of a pair by itself, beside or in place of their difference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from prefopt.maths import preference_nll
from prefopt_dpo.base import RATIO, PairMethod

if TYPE_CHECKING:
    from torch import Tensor


class NCAPair(PairMethod):
    """Noise contrastive alignment for pairs: keeps the chosen side's likelihood from falling."""

    name = "nca_pair"
    paper = "Chen et al. 2024, arXiv:2402.05369"
    formula = f"L = - log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l),   r = β ρ,   {RATIO}"
    differences = ("TRL 1.16 computes the same.",)

    def loss_at_init(self) -> float:
        return 2 * math.log(2)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_nll(chosen) + (preference_nll(-chosen) + preference_nll(-rejected)) / 2


class BCOPair(PairMethod):
    """Binary classifier optimization for pairs, without a shift: chosen above 0, rejected below."""

    name = "bco_pair"
    paper = "Jung et al. 2024, arXiv:2404.04656, with δ = 0"
    formula = f"L = - log σ(r_w) - log σ(-r_l),   r = β ρ,   {RATIO}"
    differences = (
        "ms-swift and LLaMA-Factory subtract the running mean of rewards; TRL 1.16, like this, does not. `bco` of "
        "prefopt-kto is the method with its shift.",
    )

    def loss_at_init(self) -> float:
        return 2 * math.log(2)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_nll(chosen) + preference_nll(-rejected)


class SPPOHard(PairMethod):
    """Self-play preference optimization with hard labels: each log-ratio is pulled to ±1/(2β)."""

    name = "sppo_hard"
    paper = "Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with P = 1 and 0"
    formula = f"L = (ρ_w - 1/(2β))² + (ρ_l + 1/(2β))²,   {RATIO}"
    differences = ("TRL 1.16 computes the same. The paper's P is a judge's probability; here it is 1 or 0.",)

    def loss_at_init(self) -> float:
        return 1 / (2 * self.beta**2)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ((chosen - 0.5) ** 2 + (rejected + 0.5) ** 2) / self.beta**2


class APOZero(PairMethod):
    """Anchored preference optimization, zero: for chosen sides better than what the model writes."""

    name = "apo_zero"
    paper = "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7"
    formula = f"L = 1 - σ(r_w) + σ(r_l),   r = β ρ,   {RATIO}"
    differences = ("TRL 1.16 computes the same.",)

    def loss_at_init(self) -> float:
        return 1.0

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (-chosen).sigmoid() + rejected.sigmoid()


class APODown(PairMethod):
    """Anchored preference optimization, down: for chosen sides worse than what the model writes."""

    name = "apo_down"
    paper = "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8"
    formula = f"L = σ(r_w) + 1 - σ(r_w - r_l),   r = β ρ,   {RATIO}"
    differences = ("TRL 1.16 computes the same.", "The gradient of the chosen side has no fixed sign: it is 0 at init.")
    moves: ClassVar[tuple[int, int]] = (0, -1)

    def loss_at_init(self) -> float:
        return 1.0

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return chosen.sigmoid() + (rejected - chosen).sigmoid()
