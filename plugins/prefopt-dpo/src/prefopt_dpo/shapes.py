"""Other functions of the margin than its logistic loss: squares, hinges, divergences, a function found by search."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from prefopt.api import Batch, Policy, lazy_import
from prefopt.maths import preference_nll
from prefopt_dpo.base import RATIO, PairMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class IPO(PairMethod):
    """Identity Preference Optimization: a margin of fixed size, so that certain labels do not drive it to infinity."""

    name = "ipo"
    paper = "Azar et al. 2023, arXiv:2310.12036, eq. 17"
    formula = f"L = (ρ_w - ρ_l - 1/(2β))²,   {RATIO}, divided by the completion's length"
    dialect = "`average`, as its authors say they used it: log-ratios are means over tokens. `sum` is the paper's text."
    differences = (
        "OpenRLHF, the original DPO repository and TRL's online DPO sum over tokens: at 200 tokens their beta acts as "
        "one about 200 times as large here.",
        "HALOs divides by the number of tokens whose log-ratio is not 0: at the first step that is 0/0.",
        "TRL 1.16 averages; its denominator is the same count of completion tokens.",
    )

    length: Literal["average", "sum"] = "average"
    """Whether a log-ratio is a mean or a sum over the tokens of a completion."""

    def loss_at_init(self) -> float:
        return 1 / (4 * self.beta**2)

    def log_ratio(self, batch: Batch, policy: Policy) -> Tensor:
        reduce = batch.mean_tokens if self.length == "average" else batch.sum_tokens
        return reduce(policy.logps - batch.reference_logps)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ((chosen - rejected) / self.beta - 1 / (2 * self.beta)) ** 2


class Hinge(PairMethod):
    """Hinge loss on DPO's margin, as in RSO and SLiC."""

    name = "hinge"
    paper = "Liu et al. 2023, arXiv:2309.06657 (RSO); Zhao et al. 2023, arXiv:2305.10425 (SLiC)"
    formula = f"L = max(0, 1 - β (ρ_w - ρ_l)),   {RATIO}"
    differences = ("LLaMA-Factory's `hinge` trains the sigmoid loss with TRL 0.20 and later.",)

    def loss_at_init(self) -> float:
        return 1.0

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.relu(1 - (chosen - rejected))


class EXOPair(PairMethod):
    """Efficient exact optimization for pairs: the reverse KL divergence from smoothed labels."""

    name = "exo_pair"
    paper = "Ji et al. 2024, arXiv:2402.00856, eq. 16"
    formula = f"L = q [log q - log(1-ε)] + (1-q) [log(1-q) - log ε],   q = σ(β (ρ_w - ρ_l)),   {RATIO}"
    differences = ("TRL 1.16 reads ε from `label_smoothing` and refuses 0.",)

    epsilon: float = Field(1e-3, gt=0, lt=0.5)
    """ε, the probability left to the rejected side; it must not be 0."""

    def loss_at_init(self) -> float:
        return -math.log(2) - (math.log1p(-self.epsilon) + math.log(self.epsilon)) / 2

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        margin = chosen - rejected
        for_chosen = margin.sigmoid() * (-preference_nll(margin) - math.log1p(-self.epsilon))
        for_rejected = (-margin).sigmoid() * (-preference_nll(-margin) - math.log(self.epsilon))
        return for_chosen + for_rejected


class DiscoPOP(PairMethod):
    """DiscoPOP, the loss a language model found by search: logistic for wrong pairs, exponential for right ones."""

    name = "discopop"
    paper = "Lu et al. 2024, arXiv:2406.08414, eq. 5"
    formula = f"L = (1-m) (- log σ(u)) + m e^(-u),   m = σ(u/τ),   u = β (ρ_w - ρ_l),   {RATIO}"
    moves: ClassVar[tuple[int, int]] = (-1, 1)
    differences = (
        "TRL 1.16 computes e^(-u) first: for u below -88 it is infinite times 0.",
        "At τ 0.05 the loss falls towards smaller margins at u = 0: its minimum near there is at u = -0.12.",
    )

    tau: float = Field(0.05, gt=0, lt=1)
    """τ, how sharply the two are told apart."""

    def loss_at_init(self) -> float:
        return (math.log(2) + 1) / 2

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        u = chosen - rejected
        logistic = (-u / self.tau).sigmoid() * preference_nll(u)
        return logistic + torch.exp(-preference_nll(u / self.tau) - u)  # m e^(-u), finite for every u


class FDPO(PairMethod):
    """f-DPO: DPO for a constraint by another divergence than the reverse KL."""

    name = "f_dpo"
    paper = "Wang et al. 2023, arXiv:2309.16240"
    formula = "L = - log σ(β [f'(u_w) - f'(u_l)]),   u = π(y) / π_ref(y)"
    dialect = (
        "`js` by default. The reverse KL is `dpo`. A log-ratio below -60 counts as -60 where its exponential does."
    )
    differences = (
        "TRL 1.16 takes a divergence with its sigmoid, hinge, ipo, exo, robust, discopop and sigmoid_norm losses and "
        "refuses it with the others; here it is a method of its own.",
        "ms-swift's α-divergence is (e^(-αρ_l) - e^(-αρ_w))/α with α 1; here, as in TRL, (u^(α-1) - 1)/(α-1), α 0.5.",
    )

    divergence: Literal["js", "forward_kl", "alpha"] = "js"
    """Jensen-Shannon, forward KL, or the α-divergence with α = `alpha`."""
    alpha: float | None = Field(None, gt=0, lt=1)
    """α of the α-divergence, 0.5 if not given: towards 1 the reverse KL, towards 0 the forward KL."""

    def loss_at_init(self) -> float:
        return math.log(2)

    @model_validator(mode="after")
    def _alpha_belongs_to_alpha(self) -> Self:
        if self.alpha is not None and self.divergence != "alpha":
            raise ValueError(f"alpha means nothing for the divergence {self.divergence}: set divergence to alpha")
        return self

    def log_ratio(self, batch: Batch, policy: Policy) -> Tensor:
        """f'(u), which takes the place of the log-ratio."""
        ratio = super().log_ratio(batch, policy)
        if self.divergence == "js":  # log 2u/(1+u)
            return math.log(2) - preference_nll(ratio)
        alpha = 0.0 if self.divergence == "forward_kl" else self.alpha or 0.5
        power = alpha - 1  # f'(u) = (u^power - 1) / power
        return torch.expm1((power * ratio).clamp(max=LARGEST)) / power

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_nll(chosen - rejected)


LARGEST = 60.0
"""Of an exponent: e^60 is finite in float32, and so is its product with a gradient."""
