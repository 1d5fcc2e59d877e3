"""Methods over rankings of K completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from prefopt.api import Algorithm, Batch, Loss, Needs, Policy, Ranking, lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class RankingMethod(Algorithm):
    """A loss of the mean log-probabilities of a ranking, best first, and the likelihood of the best."""

    eats = Ranking

    def needs(self) -> Needs:
        return Needs(rows=frozenset({"rank"}), during=frozenset({"logps"}))

    def ranked(self, batch: Batch, policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
        """Mean log-probabilities, places (0 the best) and which members there are. [G, K] each."""
        means = batch.ranked(batch.mean_tokens(policy.logps))
        present = batch.ranked(torch.ones_like(batch.rank)).bool()
        return means, batch.ranked(batch.rank), present

    def metrics(self, batch: Batch, means: Tensor, better: Tensor) -> dict[str, Tensor]:
        """`reward/accuracy`: the share of ordered pairs that the mean log-probabilities order alike, ties one half."""
        right = (torch.sign(means[:, :, None] - means[:, None, :]) + 1) / 2
        told = better.sum((1, 2))
        accuracy = torch.where(told > 0, (right * better).sum((1, 2)) / told.clamp(min=1), 0.5)
        return {"reward/accuracy": batch.mean(accuracy.detach(), "groups", weighted=False)}


class RRHF(RankingMethod):
    """Rank Responses to align Human Feedback: a hinge for each pair in the wrong order, and the best one's
    likelihood."""

    name = "rrhf"
    paper = "Yuan et al. 2023, arXiv:2304.05302"
    formula = "L = Σ_{r_i < r_j} max(0, p_i - p_j) - α Σ_t log π(y_best,t),   p = mean_t log π(y_t)"
    dialect = "Tied completions are no pair; of several best ones the first counts."
    differences = ("No framework read here has it. The formula is the paper's, not compared with its authors' code.",)

    alpha: PositiveFloat = 1.0
    """The weight of the best completion's likelihood; 1 in the paper."""

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        means, ranks, present = self.ranked(batch, policy)
        better = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
        excess = torch.relu(means[:, None, :] - means[:, :, None])  # [g, i, j]: p_j - p_i
        best = batch.ranked(batch.sum_tokens(policy.logps))[:, 0]
        value = (excess * better).sum((1, 2)) - self.alpha * best
        return Loss(batch.mean(value, "groups"), self.metrics(batch, means, better))


class PRO(RankingMethod):
    """Preference Ranking Optimization: each completion against all below it, and the best one's likelihood."""

    name = "pro"
    paper = "Song et al. 2023, arXiv:2306.17492"
    formula = "L = - Σ_k log [ exp(p_k/T_k) / Σ_{i below or at k} exp(p_i/T_ki) ] - β p_best,   p = mean_t log π(y_t)"
    dialect = (
        "T_ki = 1/(r_k - r_i) and T_k the least of them, from each completion's score; `temperature: none` has T = 1. "
        "Tied completions do not compete with each other."
    )
    differences = ("No framework read here has it. The formula is the paper's, not compared with its authors' code.",)

    beta: PositiveFloat = 0.05
    """β, the weight of the best completion's likelihood: 0.05 (l - 1) for l completions in the paper."""
    temperature: Literal["none", "scores"] = "none"
    """Whether the difference of two completions' scores scales their competition; every completion then needs one."""

    def needs(self) -> Needs:
        fields = {"rank", "score"} if self.temperature == "scores" else {"rank"}
        return Needs(rows=frozenset(fields), during=frozenset({"logps"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        means, ranks, present = self.ranked(batch, policy)
        better = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]  # [g, k, i]
        sharp = self._sharpness(batch, better)
        own = means * sharp.masked_fill(~better, 0.0).amax(2)  # p_k / T_k, where T_k is the least
        rivals = (means[:, None, :] * sharp).masked_fill(~better, -torch.inf)
        everyone = torch.cat([own[:, :, None], rivals], 2)
        nll = (torch.logsumexp(everyone, 2) - own) * better.any(2)
        value = nll.sum(1) - self.beta * means[:, 0]
        return Loss(batch.mean(value, "groups"), self.metrics(batch, means, better))

    def _sharpness(self, batch: Batch, better: Tensor) -> Tensor:
        """1 / T_ki. [G, K, K]"""
        if self.temperature == "none":
            return torch.ones(better.shape, dtype=torch.float32, device=better.device)
        scores = batch.ranked(batch.score)
        return (scores[:, :, None] - scores[:, None, :]).clamp(min=0)
