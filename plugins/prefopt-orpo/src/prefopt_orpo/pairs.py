"""Methods over pairs: the odds ratio, contrastive likelihoods, and rewards of mean log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator

from prefopt.api import Batch, Policy, Role, Row, Sequence, lazy_import, opening
from prefopt.maths import log1mexp, preference_nll
from prefopt_orpo.base import FreeMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class ORPO(FreeMethod):
    """Odds Ratio Preference Optimization: supervised fine-tuning that also tells chosen from rejected."""

    name = "orpo"
    paper = "Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7"
    formula = (
        "L = NLL(y_w) - λ log σ(log odds(y_w) - log odds(y_l)),   odds(y) = p / (1-p),   log p = mean_t log π(y_t)"
    )
    dialect = "NLL over the tokens of the chosen completion, one mean over the step. log(1-p) by log1mexp."
    differences = (
        "TRL 1.16's NLL covers the prompt as well: `nll: sequence`.",
        "LLaMA-Factory computes log1p(-exp(log p)), which is minus infinity for a completion of probability 1.",
    )

    beta: PositiveFloat = 0.1
    """λ, the weight of the odds ratio."""
    nll: Literal["completion", "sequence"] = "completion"
    """Whether the likelihood covers the chosen completion, or the prompt before it as well."""

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        own = super().arrange(rows)
        return own if self.nll == "completion" else [*own, *(opening(row, i) for i, row in enumerate(rows))]

    def likelihood(self, batch: Batch, policy: Policy) -> Tensor:
        return -batch.mean(policy.logps, "tokens", roles=(Role.CHOSEN, Role.OPENING))

    @property
    def nll_weight(self) -> float:
        return 1.0

    def reward(self, batch: Batch, policy: Policy) -> Tensor:
        """The log odds of each sequence. [N]"""
        logp = batch.mean_tokens(policy.logps)
        return logp - log1mexp(logp)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self.beta * preference_nll(chosen - rejected)


class CPO(FreeMethod):
    """Contrastive Preference Optimization: DPO with a uniform reference, and the chosen side's likelihood."""

    name = "cpo"
    paper = "Xu et al. 2024, arXiv:2401.08417, eq. 3"
    formula = "L = - log σ(β (s_w - s_l)) + α NLL(y_w),   s = Σ_t log π(y_t)"
    dialect = "Log-probabilities are summed; NLL is one mean over the step's chosen tokens."
    differences = ("TRL 1.16 (experimental) computes the same, with means over microbatches in place of the step.",)

    alpha: NonNegativeFloat = 1.0
    """α, the weight of the chosen side's likelihood."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a label is the wrong way round."""

    @property
    def nll_weight(self) -> float:
        return self.alpha

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_nll(chosen - rejected, self.label_smoothing)


class SimPO(FreeMethod):
    """Simple Preference Optimization: the reward is the mean log-probability, with a margin."""

    name = "simpo"
    paper = "Meng et al. 2024, arXiv:2405.14734, eq. 6"
    formula = "L = - log σ(β (s_w/|y_w| - s_l/|y_l|) - γ),   s = Σ_t log π(y_t)"
    dialect = "Pure, with the authors' β 2 and γ/β 0.25: no likelihood of the chosen side."
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16 and ms-swift add the chosen side's likelihood unless told otherwise: that is `cpo_simpo` here.",
        "β is 0.1 in TRL and LLaMA-Factory, 10 in HALOs.",
    )

    beta: PositiveFloat = 2.0
    """The scale of the reward, of one token."""
    gamma: NonNegativeFloat = 0.5
    """γ, by how much the chosen reward is to exceed the rejected one: β times 0.25 in the paper's experiments."""

    def reward(self, batch: Batch, policy: Policy) -> Tensor:
        return self.beta * batch.mean_tokens(policy.logps)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_nll(chosen - rejected - self.gamma)


class CPOSimPO(SimPO):
    """CPO-SimPO: SimPO with the chosen side's likelihood."""

    name = "cpo_simpo"
    paper = "Xu et al. 2024, the authors' CPO_SIMPO repository; arXiv:2401.08417 and arXiv:2405.14734"
    formula = "L = - log σ(β (s_w/|y_w| - s_l/|y_l|) - γ) + α NLL(y_w),   s = Σ_t log π(y_t)"
    dialect = "NLL is one mean over the step's chosen tokens; β and γ are those of `simpo`."
    differences = ("TRL 1.16 calls it `simpo`, with β 0.1, γ 0.5, α 1; ms-swift with β 2, γ 1, α 1.",)

    alpha: PositiveFloat = 1.0
    """α, the weight of the chosen side's likelihood."""

    @property
    def nll_weight(self) -> float:
        return self.alpha


class AlphaPO(SimPO):
    """AlphaPO: SimPO with a reward of another shape, (1 - p^-α)/α of the mean probability."""

    name = "alphapo"
    paper = "Gupta et al. 2025, arXiv:2501.03884"
    formula = "L = - log σ(β (v_w - v_l) - γ),   v = (1 - p^-α) / α,   log p = mean_t log π(y_t)"
    dialect = "Pure, as `simpo`. An exponent above 60 counts as 60."
    differences = ("TRL 1.16 takes p from exp(log p), which is 0 for unlikely completions: infinite rewards.",)

    alpha: float = Field(0.25, gt=-5, lt=5)
    """α: 0 is `simpo`; the larger, the more unlikely completions are pushed apart."""

    @field_validator("alpha")
    @classmethod
    def _not_zero(cls, value: float) -> float:
        if value == 0:
            raise ValueError("alpha 0 is simpo: use that name")
        return value

    def reward(self, batch: Batch, policy: Policy) -> Tensor:
        exponent = (-self.alpha * batch.mean_tokens(policy.logps)).clamp(max=LARGEST)
        return -self.beta * torch.expm1(exponent) / self.alpha


class SLiCHF(FreeMethod):
    """SLiC-HF: a hinge on summed log-probabilities, and the chosen side's likelihood."""

    name = "slic_hf"
    paper = "Zhao et al. 2023, arXiv:2305.10425"
    formula = "L = max(0, δ - s_w + s_l) - λ s_w,   s = Σ_t log π(y_t)"
    dialect = "The likelihood is summed over a completion, the mean over pairs, as in HALOs."
    differences = ("HALOs computes the same, with means over microbatches.",)

    beta: PositiveFloat = 1.0
    """δ, the margin in nats."""
    penalty: PositiveFloat = 0.1
    """λ, the weight of the chosen side's likelihood."""

    def reward(self, batch: Batch, policy: Policy) -> Tensor:
        return batch.sum_tokens(policy.logps)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.relu(self.beta - chosen + rejected) - self.penalty * chosen


LARGEST = 60.0
"""Of an exponent: e^60 is finite in float32, and so is its product with a gradient."""
