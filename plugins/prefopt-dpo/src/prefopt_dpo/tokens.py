"""DPO that does not take every token alike: by place, by chance, by the divergence of whole distributions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from prefopt.api import Batch, Loss, Needs, Policy, StepContext, lazy_import
from prefopt.maths import preference_nll, stop_gradient
from prefopt_dpo.base import RATIO, PairMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class SharedLengthMethod(PairMethod):
    """DPO over as many tokens of each side as the shorter one has; the others weigh `alpha`."""

    def loss_at_init(self) -> float:
        return math.log(2)

    def places(self, batch: Batch) -> Tensor:
        """The order in which a completion's tokens are taken, from 0. [N, T]"""
        raise NotImplementedError(f"write {type(self).__name__}.places")

    @property
    def others(self) -> float:
        """What a token beyond the shared length weighs."""
        return 0.0

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        ratio = (policy.logps - batch.reference_logps).masked_fill(~batch.mask, 0.0)
        shared = torch.minimum(*batch.pairs(batch.lengths))[:, None]
        sides = zip(batch.pairs(ratio), batch.pairs(self.places(batch)), strict=True)
        chosen, rejected = (
            self.beta * (x * torch.where(place < shared, 1.0, self.others)).sum(1) for x, place in sides
        )
        metrics = batch.pair_metrics(self.beta * batch.sum_tokens(policy.logps - batch.reference_logps))
        return Loss(batch.mean(preference_nll(chosen - rejected), "pairs"), metrics)


class LDDPO(SharedLengthMethod):
    """LD-DPO: tokens beyond the length of the shorter side count less, so that length is worth less."""

    name = "ld_dpo"
    paper = "Liu et al. 2024, arXiv:2409.06411"
    formula = "L = - log σ(β (ρ_w - ρ_l)),   ρ = Σ_{t <= m} δ_t + α Σ_{t > m} δ_t,   m = min(|y_w|, |y_l|)"
    dialect = "The tail weighs α under the policy and under the reference, so that both agree at the start."
    differences = ("LLaMA-Factory and ms-swift shorten the policy's side only: their loss at the start is not log 2.",)

    alpha: float = Field(0.5, ge=0, lt=1)
    """α, the weight of a token beyond the shared length; 1 would be `dpo`."""

    @property
    def others(self) -> float:
        return self.alpha

    def places(self, batch: Batch) -> Tensor:
        return batch.mask.cumsum(1) - 1


class SamPO(SharedLengthMethod):
    """SamPO: DPO over equally many tokens of each side, drawn at random, so that length has no share in the margin."""

    name = "sampo"
    paper = "Lu et al. 2024, arXiv:2406.10957"
    formula = "L = - log σ(β (ρ_w - ρ_l)),   ρ over min(|y_w|, |y_l|) tokens of each side, drawn without replacement"
    dialect = "The same tokens count under policy and reference; they are drawn anew in every step, from its seed."
    differences = ("No framework read here has it. The formula is the paper's, not compared with its authors' code.",)

    def prepare(self, batch: Batch, ctx: StepContext) -> Batch:
        """`drawn` [N, T]: each token's place in a random order of its completion."""
        drawn = torch.rand(batch.mask.shape, generator=ctx.key("sampo")).masked_fill(~batch.mask.cpu(), 2.0)
        return batch.with_columns(drawn=drawn.argsort(1).argsort(1).to(batch.mask.device))

    def places(self, batch: Batch) -> Tensor:
        return batch.drawn


class TDPO1(PairMethod):
    """Token-level DPO: the margin gives up what the rejected side's distributions have moved more than the chosen's."""

    name = "tdpo1"
    paper = "Zeng et al. 2024, arXiv:2404.11999"
    formula = f"L = - log σ(β (ρ_w - ρ_l) - β (K_l - K_w)),   K = Σ_t KL(π_ref || π)(x, y_<t),   {RATIO}"
    dialect = f"KL over the whole vocabulary, in tiles. It keeps the reference in memory. {PairMethod.dialect}"
    differences = ("No framework read here has it. The formula is the paper's, not compared with its authors' code.",)

    def loss_at_init(self) -> float:
        return math.log(2)

    def needs(self) -> Needs:
        return Needs(before={"reference_logps"}, during=frozenset({"logps", "token_kl"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        reward = self.beta * self.log_ratio(batch, policy)
        kl_chosen, kl_rejected = batch.pairs(self.beta * batch.sum_tokens(policy.token_kl))
        chosen, rejected = batch.pairs(reward)
        nll = preference_nll(chosen - rejected - self.moved(kl_chosen, kl_rejected))
        kl = {"kl/chosen": kl_chosen, "kl/rejected": kl_rejected}
        means = {name: batch.mean(x.detach() / self.beta, "pairs", weighted=False) for name, x in kl.items()}
        return Loss(batch.mean(nll, "pairs"), batch.pair_metrics(reward) | means)

    def moved(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """What is taken from the margin, from β K of both sides. [P], [P] -> [P]"""
        return rejected - chosen


class TDPO2(TDPO1):
    """Token-level DPO, second form: the chosen side's divergence is a constant, the difference weighs α."""

    name = "tdpo2"
    paper = "Zeng et al. 2024, arXiv:2404.11999"
    formula = f"L = - log σ(β (ρ_w - ρ_l) - α β (K_l - sg K_w)),   K = Σ_t KL(π_ref || π)(x, y_<t),   {RATIO}"

    alpha: float = Field(0.5, gt=0)
    """α, how much the difference of divergences counts."""

    def moved(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self.alpha * (rejected - stop_gradient(chosen))
