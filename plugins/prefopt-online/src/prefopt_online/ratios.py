"""GRPO's advantage with other ideas of what a ratio is and how far it counts: GSPO, GMPO, CISPO, SAPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat

from prefopt.api import Batch, Policy, lazy_import
from prefopt.maths import ratio_of, stop_gradient
from prefopt_online.base import EACH, RATIO, TOKENS, mean_of_means, mean_of_tokens
from prefopt_online.groups import STANDARDISED, GroupAdvantage, GroupMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class GSPO(GroupMethod):
    """Group sequence policy optimization: one ratio for a completion, the geometric mean of its tokens' ratios."""

    name = "gspo"
    paper = "Zheng et al. 2025, arXiv:2507.18071, eq. 5 to 7"
    formula = f"L = max(-A s, -A clip(s, 1-ε, 1+ε_high)),   s = (π(y) / π_old(y))^(1/|y|),   {STANDARDISED}"
    dialect = "The mean over completions."
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16: `importance_sampling_level: sequence` with the clip of GRPO, 0.2, unless told otherwise.",
    )

    clip: float = Field(3e-4, gt=0, lt=1)
    """ε: a ratio below 1 - ε has gone far enough. A mean moves far less than a token does."""
    clip_high: PositiveFloat | None = 4e-4
    """ε above, as `clip` if not given."""

    def loss_at_init(self) -> float:
        return 0.0

    def compared(self, batch: Batch, log_ratio: Tensor) -> Tensor:
        return batch.mean_tokens(log_ratio)[:, None]


class GMPO(GroupMethod):
    """Geometric-mean policy optimization: the geometric mean of ratios that are clipped token by token."""

    name = "gmpo"
    paper = "Zhao et al. 2025, arXiv:2507.20673"
    formula = f"L = -A exp(1/|y| Σ_t m_t),   m_t = log r_t, but at most ε in the direction of A,   {STANDARDISED}"
    dialect = "The clip is of log-ratios: ε 0.4 stands for ratios from e^-0.4 to e^0.4. The mean over completions."
    differences: ClassVar[tuple[str, ...]] = ("TRL's experimental GMPO and verl have the same clip.",)

    clip: float = Field(0.4, gt=0, lt=1)
    """ε: the largest log-ratio of a token towards which its advantage pulls."""

    def loss_at_init(self) -> float:
        return 0.0

    def objective(self, batch: Batch, policy: Policy, log_ratio: Tensor) -> Tensor:
        advantage = batch.advantages
        gained = torch.where(advantage > 0, log_ratio.clamp(max=self.high), log_ratio.clamp(min=-self.clip))
        return -ratio_of(batch.mean_tokens(gained)) * advantage[:, 0]


class CISPO(GroupAdvantage):
    """Clipped importance sampling: the ratio is a weight with a cap and no gradient, so that no token falls silent."""

    name = "cispo"
    paper = "MiniMax 2025, arXiv:2506.13585, eq. 4 and 5"
    formula = f"L = mean_t of -sg(min(r_t, c)) A log π(y_t),   {STANDARDISED},   {RATIO}"
    dialect = f"The cap c is absolute. {TOKENS}"
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16's cap is absolute as well, 0.2 unless told otherwise, which is below every ratio near 1.",
        "verl and NeMo-RL clip to 1 ± ε, open-instruct to at most 1 + ε.",
    )

    cap: PositiveFloat = 5.0
    """c, the largest weight."""

    def objective(self, batch: Batch, policy: Policy, log_ratio: Tensor) -> Tensor:
        return -stop_gradient(ratio_of(log_ratio).clamp(max=self.cap)) * batch.advantages * policy.logps

    def aggregate(self, batch: Batch, x: Tensor) -> Tensor:
        return mean_of_tokens(batch, x)


class SAPO(GroupAdvantage):
    """Soft adaptive policy optimization: a gate that closes smoothly as the ratio leaves 1, sooner for tokens that are
    to become less likely."""

    name = "sapo"
    paper = "Gao et al. 2025, arXiv:2511.20347"
    formula = f"L = mean of -A (4/τ) σ(τ (r_t - 1)),   τ = τ+ if A > 0 else τ-,   {STANDARDISED},   {RATIO}"
    dialect = f"{EACH} At r = 1 the gradient is that of GRPO."
    differences: ClassVar[tuple[str, ...]] = ("TRL 1.16 and verl have the same gate and temperatures.",)

    positive_temperature: PositiveFloat = 1.0
    """τ+: how soon the gate closes for a token to be made more likely."""
    negative_temperature: PositiveFloat = 1.05
    """τ-: how soon for one to be made less likely."""

    def objective(self, batch: Batch, policy: Policy, log_ratio: Tensor) -> Tensor:
        advantage = batch.advantages
        towards, away = (advantage.new_tensor(t) for t in (self.positive_temperature, self.negative_temperature))
        tau = torch.where(advantage > 0, towards, away)
        return -advantage * 4 / tau * (tau * (ratio_of(log_ratio) - 1)).sigmoid()

    def aggregate(self, batch: Batch, x: Tensor) -> Tensor:
        return mean_of_means(batch, x)
