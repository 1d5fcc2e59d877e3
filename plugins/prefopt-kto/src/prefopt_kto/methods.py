"""Methods that learn from replies called desirable or not, one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence as List
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, PositiveInt

from prefopt.api import Algorithm, Batch, Judgement, Loss, Needs, Policy, Role, Row, Sequence, StepContext, lazy_import
from prefopt.maths import preference_nll

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

RATIO = "ρ = Σ_t [ log π(y_t) - log π_ref(y_t) ]"
JUDGED = (Role.DESIRABLE, Role.UNDESIRABLE)
TIE = 1e-5
"""Heights nearer to 0 are neither above nor below: sums of log-probabilities are no better than that in float32."""
ENOUGH = 256
"""Rows after which the shares of desirable and undesirable ones are taken for those of the data."""


class JudgementMethod(Algorithm):
    """A loss of each reply's implicit reward `r = β ρ`, one way for desirable replies, another for undesirable ones."""

    eats = Judgement

    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference: the temperature of the implicit reward."""

    def needs(self) -> Needs:
        return Needs(before={"reference_logps"}, during=frozenset({"logps"}))

    def above(self, batch: Batch, reward: Tensor) -> Tensor:
        """How far each reward is above what divides good from bad. [N]"""
        return reward

    def each(self, height: Tensor, desirable: Tensor) -> Tensor:
        """The loss of each reply from its height, and which are desirable. [N], [N] -> [N]"""
        raise NotImplementedError(f"write {type(self).__name__}.each")

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        reward = self.beta * batch.sum_tokens(policy.logps - batch.reference_logps)
        height, desirable = self.above(batch, reward), batch.role == Role.DESIRABLE
        side = torch.where(desirable, height, -height)
        right = (torch.sign(side * (side.abs() > TIE)) + 1) / 2
        metrics = {
            "reward/mean": batch.mean(reward.detach(), "sequences", weighted=False),
            "reward/accuracy": batch.mean(right.detach(), "sequences", weighted=False),
        }
        return Loss(batch.mean(self.each(height, desirable), "sequences"), metrics)


class KTO(JudgementMethod):
    """Kahneman-Tversky Optimization: gains and losses are felt against what the policy has moved on other replies."""

    name = "kto"
    paper = "Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8"
    formula = (
        f"L = λ_D (1 - σ(r - β z)) or λ_U (1 - σ(β z - r)),   r = β ρ,   z = max(0, mean ρ of mismatched),   {RATIO}"
    )
    dialect = (
        "z is a mean over the whole step, without gradient: each prompt with the completion of the row before it, of "
        "another prompt if there is one. With no other completion in the step z is 0."
    )
    differences = (
        "TRL 1.16 takes z over a microbatch on every device, the mean of devices: `kl_rows` is its microbatch.",
        "HALOs takes the mean over mismatched pairs whose log-ratio is not 0.",
    )

    desirable_weight: PositiveFloat = 1.0
    """λ_D. The paper wants λ_D n_D / (λ_U n_U) between 1 and 4/3; a run outside says so."""
    undesirable_weight: PositiveFloat = 1.0
    """λ_U."""
    kl_rows: PositiveInt | None = None
    """Over how many of a step's rows each z is taken; not set, over all."""

    def loss_at_init(self) -> float | None:
        return self.desirable_weight / 2 if self.desirable_weight == self.undesirable_weight else None

    def needs(self) -> Needs:
        before = {"reference_logps": Role, "old_logps": {Role.PROBE}}
        return Needs(before=before, during=frozenset({"logps"}))

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        """Beside each row a probe: its prompt with another row's completion."""
        own = super().arrange(rows)
        size = self.kl_rows or max(1, len(own))
        blocks = [own[start : start + size] for start in range(0, len(own), size)]
        return own + [probe for block in blocks for i in range(len(block)) for probe in _probes(block, i)]

    def prepare(self, batch: Batch, ctx: StepContext) -> Batch:
        """`divergence` [N]: z of each row."""
        probe = batch.role == Role.PROBE
        moved = batch.sum_tokens(batch.old_logps - batch.reference_logps)
        block = torch.zeros_like(batch.group) if self.kl_rows is None else batch.group // self.kl_rows
        sums, counts = (torch.zeros(int(block.max()) + 1, dtype=moved.dtype) for _ in range(2))
        sums.index_add_(0, block[probe], moved[probe])
        counts.index_add_(0, block[probe], torch.ones_like(moved[probe]))
        divergence = (sums / counts.clamp(min=1)).clamp(min=0)
        ctx.record("kl/mismatched", divergence[block[probe]].mean() if probe.any() else 0.0)
        self._watch(batch, ctx)
        return batch.with_columns(divergence=divergence[block])

    def _watch(self, batch: Batch, ctx: StepContext) -> None:
        """Says once when the weights of the two classes are far from what the paper advises."""
        here = torch.tensor([float((batch.role == role).sum()) for role in JUDGED])
        seen = ctx.state.get("kto/seen", torch.zeros(2))
        ctx.state["kto/seen"] = seen + here
        desirable, undesirable = (seen + here).tolist()
        ratio = self.desirable_weight * desirable / (self.undesirable_weight * undesirable) if undesirable else math.inf
        if seen.sum() < ENOUGH <= (seen + here).sum() and not 0.99 <= ratio <= 4 / 3 + 0.01:
            ctx.warn(
                f"kto: desirable rows weigh {ratio:.2f} times what undesirable ones do; the paper advises 1 to 1.33: "
                f"set desirable_weight or undesirable_weight ({desirable:.0f} and {undesirable:.0f} rows so far)"
            )

    def above(self, batch: Batch, reward: Tensor) -> Tensor:
        return reward - self.beta * batch.divergence

    def each(self, height: Tensor, desirable: Tensor) -> Tensor:
        gain, loss = self.desirable_weight * (-height).sigmoid(), self.undesirable_weight * height.sigmoid()
        return torch.where(desirable, gain, loss)


def _probes(block: List[Sequence], i: int) -> list[Sequence]:
    """Sequence `i` with the completion of the one before it, or of the next before that, which must differ from its
    own; of another prompt if there is one. None when there is none."""
    own = block[i]
    before = [*reversed(block[:i]), *reversed(block[i + 1 :])]
    others = [s for s in before if s.completion.text != own.completion.text]
    others.sort(key=lambda s: s.prompt == own.prompt)
    return [replace(own, completion=s.completion, role=Role.PROBE) for s in others[:1]]


class BCO(JudgementMethod):
    """Binary Classifier Optimization: a classifier of good and bad, whose logit is the reward above its running
    mean."""

    name = "bco"
    paper = "Jung et al. 2024, arXiv:2404.04656"
    formula = f"L = - log σ(r - δ) or - log σ(δ - r),   δ = running mean of r,   r = β ρ,   {RATIO}"
    dialect = (
        "δ is the mean of two means, of desirable and of undesirable replies so far, this step's among them, without "
        "gradient; of one class alone, its mean."
    )
    differences = (
        "TRL (until 1.15) took δ over microbatches. The density ratio for shifted prompts is not here.",
        "It costs a forward pass more than `apo_zero_unpaired`, to know the step's rewards before its gradients.",
    )

    def loss_at_init(self) -> float:
        return math.log(2)

    def needs(self) -> Needs:
        return Needs(before={"reference_logps", "old_logps"}, during=frozenset({"logps"}))

    def prepare(self, batch: Batch, ctx: StepContext) -> Batch:
        """`shift` [N]: δ."""
        reward = self.beta * batch.sum_tokens(batch.old_logps - batch.reference_logps)
        means = []
        for role in JUDGED:
            seen = ctx.state.get(f"bco/{role.name.lower()}", torch.zeros(2, dtype=torch.double))
            own = reward[batch.role == role].double()
            seen = seen + torch.stack([own.sum(), torch.tensor(float(len(own)), dtype=torch.double)])
            ctx.state[f"bco/{role.name.lower()}"] = seen
            if seen[1]:
                means.append(seen[0] / seen[1])
        shift = torch.stack(means).mean()
        ctx.record("reward/shift", shift)
        return batch.with_columns(shift=shift.to(reward).expand(len(batch)))

    def above(self, batch: Batch, reward: Tensor) -> Tensor:
        return reward - batch.shift

    def each(self, height: Tensor, desirable: Tensor) -> Tensor:
        return preference_nll(torch.where(desirable, height, -height))


class APOZeroUnpaired(JudgementMethod):
    """Anchored preference optimization, zero, for replies judged one by one."""

    name = "apo_zero_unpaired"
    paper = "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, each side by itself"
    formula = f"L = 1 - σ(r) or σ(r),   r = β ρ,   {RATIO}"
    dialect = "Summed log-ratios; one mean over all replies of a step."
    differences = ("TRL 1.16 (`KTOTrainer`, `apo_zero_unpaired`) computes the same.",)

    def loss_at_init(self) -> float:
        return 0.5

    def each(self, height: Tensor, desirable: Tensor) -> Tensor:
        return torch.where(desirable, (-height).sigmoid(), height.sigmoid())
