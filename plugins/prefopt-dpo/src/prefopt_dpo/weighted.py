"""DPO that does not take every pair alike: by how likely the policy is to write it, by how large its margin is."""

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


LARGEST = 30.0
"""Of an exponent: no vocabulary gives more, since log π(y) <= 0 and the collision entropy is at most its logarithm."""


class WPO(PairMethod):
    """Weighted preference optimization: pairs count by how likely the policy is to write them."""

    name = "wpo"
    paper = "Zhou et al. 2024, arXiv:2406.11827, eq. 2"
    formula = f"L = - sg(ω_w ω_l) log σ(r_w - r_l),   ω = exp(mean_t [log π(y_t) - log Σ_v π(v)²]),   {RATIO}"
    dialect = f"`sampled` alignment of weights, constant in the gradient. {PairMethod.dialect}"
    differences = (
        "TRL 1.16 (`use_weighting`) computes the same; with its `sft` loss in the list it raises.",
        "open-instruct sums log-probabilities in ω, leaves the collision term out, and lets the gradient through.",
    )

    def needs(self) -> Needs:
        return Needs(before={"reference_logps"}, during=frozenset({"logps", "collision_entropy"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        reward = self.beta * self.log_ratio(batch, policy)
        chosen, rejected = batch.pairs(reward)
        likely, other = batch.pairs(batch.mean_tokens(policy.logps + policy.collision_entropy).clamp(max=LARGEST).exp())
        weight = stop_gradient(likely * other)
        metrics = batch.pair_metrics(reward) | {"wpo/weight": batch.mean(weight, "pairs", weighted=False)}
        return Loss(batch.mean(weight * preference_nll(chosen - rejected), "pairs"), metrics)


class BetaDPO(PairMethod):
    """β-DPO: a beta for each step, larger when its margins are; pairs with unusual margins are left out."""

    name = "beta_dpo"
    paper = "Wu et al. 2024, arXiv:2407.08639"
    formula = "L = - log σ(β_step (ρ_w - ρ_l)),   β_step = β [1 + α (mean M - M0)],   M = β (ρ_w - ρ_l)"
    dialect = (
        "M0 and its deviation are running moments; `keep` of a step's pairs are drawn by the normal density of M "
        "around M0. β_step is at least a thousandth of β."
    )
    differences = ("No framework read here has it; not compared with its authors' code.",)

    alpha: float = Field(0.6, gt=0)
    """α, how much beta follows the margins."""
    keep: float = Field(0.8, gt=0, le=1)
    """The share of a step's pairs that is trained on."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """How much of M0 and its deviation is kept from step to step."""

    def loss_at_init(self) -> float:
        return math.log(2)

    def needs(self) -> Needs:
        return Needs(before={"reference_logps", "old_logps"}, during=frozenset({"logps"}))

    def prepare(self, batch: Batch, ctx: StepContext) -> Batch:
        """`share` [N]: what a pair weighs, 0 when left out; `step_beta` [N]."""
        chosen, rejected = batch.pairs(self.beta * batch.sum_tokens(batch.old_logps - batch.reference_logps))
        margin = chosen - rejected
        center = self._moment("beta_dpo/margin", margin.mean(), ctx)
        spread = self._moment("beta_dpo/spread", margin.std(correction=0), ctx).clamp(min=1e-6)
        beta = (self.beta * (1 + self.alpha * (margin.mean() - center))).clamp(min=self.beta * 1e-3)
        ctx.record("beta", beta)
        size = max(1, round(self.keep * len(margin)))
        score = -(((margin - center) / spread) ** 2) / 2 + self._gumbel(margin, ctx)  # draws without replacement
        share = torch.zeros_like(margin).index_fill_(0, score.topk(size).indices, len(margin) / size)
        by_group = dict(zip(batch.pairs(batch.group)[0].tolist(), share.tolist(), strict=True))
        shares = torch.tensor([by_group[g] for g in batch.group.tolist()], dtype=margin.dtype)
        return batch.with_columns(share=shares, step_beta=beta.expand(len(batch)))

    def _moment(self, name: str, value: Tensor, ctx: StepContext) -> Tensor:
        """The running mean of `value`, which begins with its first."""
        before = ctx.state.get(name, value)
        ctx.state[name] = self.momentum * before + (1 - self.momentum) * value
        return before

    def _gumbel(self, like: Tensor, ctx: StepContext) -> Tensor:
        uniform = torch.rand(like.shape, generator=ctx.key("beta_dpo"), dtype=torch.double).clamp(1e-12, 1 - 1e-12)
        return -(-uniform.log()).log().to(like)

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        reward = batch.step_beta * self.log_ratio(batch, policy)
        chosen, rejected = batch.pairs(reward)
        share, _ = batch.pairs(batch.share)
        return Loss(batch.mean(share * preference_nll(chosen - rejected), "pairs"), batch.pair_metrics(reward))
