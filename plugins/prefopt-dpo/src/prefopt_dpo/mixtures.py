"""Sums of losses: DPO with the likelihood of the chosen side, and weighted mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat

from prefopt.api import Batch, Loss, Policy
from prefopt.maths import preference_nll
from prefopt_dpo.base import RATIO, PairMethod
from prefopt_dpo.dpo import DPO
from prefopt_dpo.shapes import DiscoPOP, EXOPair, Hinge
from prefopt_dpo.sides import APODown, APOZero, BCOPair, NCAPair

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["dpo", "hinge", "exo_pair", "discopop", "nca_pair", "bco_pair", "apo_zero", "apo_down", "sft"]
PARTS: Mapping[str, type[PairMethod]] = {
    method.name: method for method in (DPO, Hinge, EXOPair, DiscoPOP, NCAPair, BCOPair, APOZero, APODown)
}


class RPO(PairMethod):
    """DPO with the likelihood of the chosen side (RPO, IRPO)."""

    name = "rpo"
    paper = "Pang et al. 2024, arXiv:2404.19733 (IRPO); Liu et al. 2024, arXiv:2405.16436 (RPO)"
    formula = f"L = - log σ(r_w - r_l) - α log π(y_w) / |y_w|,   r = β ρ,   {RATIO}"
    dialect = "`nll: pairs` takes the mean over tokens within each chosen side first, as IRPO does."
    differences = (
        "TRL 1.16 (`loss_type: [sigmoid, sft]`) takes one mean over the chosen tokens of a microbatch: `nll: tokens`.",
        "OpenRLHF, NeMo-RL and ms-swift have α 0 by default, which is DPO.",
    )

    alpha: PositiveFloat = 1.0
    """α, the weight of the chosen side's likelihood."""
    nll: Literal["pairs", "tokens"] = "pairs"
    """Whether the likelihood is a mean over pairs of means over tokens, or one mean over the step's chosen tokens."""

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_nll(chosen - rejected)

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        found = super().loss(batch, policy)
        if self.nll == "tokens":
            nll = -batch.mean(policy.logps, "chosen_tokens")
        else:
            nll = -batch.mean(batch.pairs(batch.mean_tokens(policy.logps))[0], "pairs")
        return Loss(found.value + self.alpha * nll, {**found.metrics, "loss/nll": nll.detach()})


class MPO(PairMethod):
    """Mixed preference optimization: a weighted sum of this plugin's losses."""

    name = "mpo"
    paper = "Wang et al. 2024, arXiv:2411.10442 (InternVL-MPO)"
    formula = "L = Σ_i w_i L_i,   by default 0.8 dpo + 0.2 bco_pair + 1.0 sft"
    dialect = "Every part has its own defaults and the mixture's beta; `sft` is one mean over the step's chosen tokens."
    differences = ("TRL 1.16 (`loss_type: [sigmoid, bco_pair, sft]`, `loss_weights`) computes the same.",)

    losses: Mapping[Part, PositiveFloat] = Field({"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0}, min_length=1)
    """The weight of each part, by its name."""

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        parts = (
            weight * PARTS[name](beta=self.beta).pair_loss(chosen, rejected)
            for name, weight in self.losses.items()
            if name != "sft"
        )
        return sum(parts, start=chosen.new_zeros(chosen.shape))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        found = super().loss(batch, policy)
        likelihood = -batch.mean(policy.logps, "chosen_tokens")
        weight = self.losses.get("sft", 0.0)
        return Loss(found.value + weight * likelihood, {**found.metrics, "loss/nll": likelihood.detach()})
