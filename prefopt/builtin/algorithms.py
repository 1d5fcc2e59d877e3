"""The methods of the core: supervised fine-tuning and reward models. Pure functions of a batch, like those of any
plugin."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as List
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat

from prefopt.api import (
    Algorithm,
    Batch,
    Comparison,
    Demonstration,
    Loss,
    Needs,
    Policy,
    Ranking,
    Row,
    Sequence,
    joined,
    lazy_import,
)
from prefopt.maths import plackett_luce_nll, preference_nll, stop_gradient

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class SupervisedFineTuning(Algorithm):
    """Supervised fine-tuning: the mean negative log-likelihood of completion tokens."""

    name, eats = "sft", Demonstration
    formula = "L = - Σ_t log π(y_t | x, y_<t) / number of completion tokens in the step"
    dialect = "Completion tokens only, the end-of-sequence token among them; one mean over all tokens of the step."
    differences: ClassVar[tuple[str, ...]] = (
        "TRL 1.16 takes the same mean when `completion_only_loss` is on; for rows of `text` it also scores the prompt.",
    )

    scope: Literal["completion", "sequence"] = "completion"
    """Whether the completion is trained on, or the prompt before it as well."""

    def needs(self) -> Needs:
        return Needs(during=frozenset({"logps"}))

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        if self.scope == "completion":
            return super().arrange(rows)
        return [joined(row, i) for i, row in enumerate(rows) if isinstance(row, Demonstration)]

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        return Loss(-batch.mean(policy.logps, "tokens"))


class DynamicFineTuning(SupervisedFineTuning):
    """Dynamic fine-tuning: supervised fine-tuning in which unlikely tokens pull less."""

    name = "dft"
    paper = "Wu et al. 2025, arXiv:2508.05629"
    formula = "L = - Σ_t sg(π(y_t | x, y_<t)) log π(y_t | x, y_<t) / number of completion tokens in the step"
    dialect = "A token's probability weighs it, as a constant; one mean over all completion tokens of the step."
    differences = ("TRL 1.16 (`loss_type: dft`) computes the same.",)

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        nll = -batch.mean(policy.logps, "tokens")
        value = -batch.mean(stop_gradient(policy.logps.exp()) * policy.logps, "tokens")
        return Loss(value, {"loss/nll": nll.detach()})


class RewardModel(Algorithm):
    """Reward model from comparisons (Bradley-Terry), with soft labels, ties, margins and centring."""

    name, eats = "reward_model", Comparison
    paper = "arXiv:2203.02155, eq. 1 (Bradley & Terry 1952); margin arXiv:2307.09288, eq. 2; centring arXiv:2312.09244"
    formula = "L = - p log σ(d) - (1-p) log σ(-d) + centre (r_w + r_l)²,   d = r_w - r_l - margin"
    dialect = "The score is read at the last real token, the end-of-sequence token if the completion has one."
    differences = (
        "TRL 1.16 has no soft labels and no ties, and reads the score at the last token that differs from the padding "
        "token, which is one token early when padding is the end-of-sequence token.",
    )

    labels: Literal["soft", "hard"] = "soft"
    """`soft` uses each row's `preference` as the probability p of its label, 0.5 for a tie; `hard` takes the preferred
    side as certain and learns nothing from ties."""
    margin: bool = False
    """Subtract each row's `margin` from the difference of scores."""
    centre: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores near 0; 0.01 in the paper."""

    def needs(self) -> Needs:
        fields = {"preference", "margin"} if self.margin else {"preference"}
        return Needs(rows=frozenset(fields), during=frozenset({"scores"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        chosen, rejected = batch.pairs(policy.scores)
        preference, _ = batch.pairs(batch.preference)
        difference = chosen - rejected
        shifted = difference - batch.pairs(batch.margin)[0] if self.margin else difference
        if self.labels == "soft":
            nll = preference_nll(shifted, 1 - preference)
        else:
            nll = preference_nll(shifted) * (preference != 0.5)
        value = batch.mean(nll, "pairs") + self.centre * batch.mean((chosen + rejected) ** 2, "pairs")
        return Loss(value, _pair_quality(batch, difference.detach(), preference, nll.detach()))


def _pair_quality(batch: Batch, difference: Tensor, preference: Tensor, nll: Tensor) -> Mapping[str, Tensor]:
    """Accuracy counts a tie of scores, or of labels, as one half; `brier` is the mean squared error of
    σ(difference)."""
    right = (torch.sign(difference) * (preference != 0.5) + 1) / 2
    return {
        "loss/nll": batch.mean(nll, "pairs", weighted=False),
        "reward/accuracy": batch.mean(right, "pairs", weighted=False),
        "reward/margin": batch.mean(difference, "pairs", weighted=False),
        "calibration/brier": batch.mean((difference.sigmoid() - preference) ** 2, "pairs", weighted=False),
    }


class RewardModelListwise(Algorithm):
    """Reward model from rankings of K completions (Plackett-Luce)."""

    name, eats = "reward_model_listwise", Ranking
    paper = "Plackett 1975; Luce 1959; ties as in Breslow 1974"
    formula = "L = - Σ_k log [ exp(r_k) / Σ_{i: rank_i >= rank_k} exp(r_i) ], the mean over rankings"
    dialect = "The whole ranking is one observation; tied completions compete with each other and with all below them."
    differences = ("No other framework has it: others split a ranking into pairs and treat them as independent.",)

    def needs(self) -> Needs:
        return Needs(rows=frozenset({"rank"}), during=frozenset({"scores"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        present = batch.ranked(torch.ones_like(policy.scores)).bool()
        ranks = batch.ranked(batch.rank)
        scores = batch.ranked(policy.scores)
        nll = plackett_luce_nll(scores, ranks, present)
        return Loss(batch.mean(nll, "groups"), self._quality(batch, scores.detach(), ranks, present))

    @staticmethod
    def _quality(batch: Batch, scores: Tensor, ranks: Tensor, present: Tensor) -> Mapping[str, Tensor]:
        """Over the pairs of each ranking. Accuracy leaves out tied pairs, unless all are, and counts a tie of scores as
        one half; `brier` is the mean squared error of σ(r_i - r_j), the chance of i above j, a tie being 0.5."""
        above, below = ranks[:, :, None], ranks[:, None, :]
        pairs = present[:, :, None] & present[:, None, :] & ~torch.eye(ranks.shape[1], dtype=torch.bool).to(present)
        better = (above < below) & pairs
        difference = scores[:, :, None] - scores[:, None, :]
        right = (torch.sign(difference) + 1) / 2
        told = better.sum((1, 2))
        accuracy = torch.where(told > 0, (right * better).sum((1, 2)) / told.clamp(min=1), 0.5)
        label = (torch.sign(below - above) + 1) / 2
        error = ((difference.sigmoid() - label) ** 2 * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
        found = {"reward/accuracy": accuracy, "calibration/brier": error}
        return {name: batch.mean(x, "groups", weighted=False) for name, x in found.items()}
