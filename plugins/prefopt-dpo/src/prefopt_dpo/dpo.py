"""DPO: the preference likelihood of an implicit reward, the log-ratio of policy and reference."""

from __future__ import annotations

from pydantic import Field, PositiveFloat

from prefopt.api import Algorithm, Batch, Comparison, Loss, Needs, Policy
from prefopt.maths import preference_nll


class DPO(Algorithm):
    """Direct Preference Optimization."""

    name, eats = "dpo", Comparison
    paper = "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"
    formula = "L = - log σ(r_w - r_l),   r = β Σ_t [ log π(y_t | x, y_<t) - log π_ref(y_t | x, y_<t) ]"
    dialect = (
        "Log-probabilities are summed over the completion, its end-of-sequence token included; the mean over pairs."
    )
    differences = (
        "TRL 1.16 accepts `label_smoothing` for its sigmoid loss and ignores it; here it is the conservative DPO of "
        "E. Mitchell's note.",
        "NeMo-RL's default beta is 0.05.",
    )

    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference: the temperature of the implicit reward."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a label is the wrong way round (conservative DPO)."""

    def needs(self) -> Needs:
        return Needs(before={"reference_logps"}, during=frozenset({"logps"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        reward = self.beta * batch.sum_tokens(policy.logps - batch.reference_logps)
        chosen, rejected = batch.pairs(reward)
        nll = preference_nll(chosen - rejected, self.label_smoothing)
        return Loss(batch.mean(nll, "pairs"), batch.pair_metrics(reward))
