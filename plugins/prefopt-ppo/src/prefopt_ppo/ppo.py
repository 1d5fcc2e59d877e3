"""PPO for language models. `settings` says what can be set; this page is what is done with it, from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as List
from typing import TYPE_CHECKING, ClassVar

from prefopt.api import Batch, Draw, Loss, Needs, Policy, Row, Sequence, StepContext, lazy_import
from prefopt.maths import (
    adapted_coefficient,
    at_last,
    clipped_surrogate,
    clipped_value_loss,
    gae,
    importance_weight,
    kl_estimate,
    merged_moments,
    moments_std,
    outside_clip,
    ratio_of,
    stop_gradient,
    whiten,
)
from prefopt_ppo.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class PPO(Settings):
    """Proximal policy optimization: each token is made more or less likely by how much better than expected what
    followed it was."""

    name = "ppo"
    paper = "Schulman et al. 2017, arXiv:1707.06347, eq. 7; for language models Ziegler et al. 2019, arXiv:1909.08593"
    formula = (
        "L = mean_t max(-A_t r_t, -A_t clip(r_t, 1-ε, 1+ε)) + c ½ max((v-R)², (clip(v, v_old±ε_v)-R)²),   "
        "A_t = δ_t + γλ A_t+1,   δ_t = reward_t + γ v_t+1 - v_t,   reward_t = [t last] score - β log(π/π_ref)"
    )
    dialect = (
        "Means are over all tokens of a minibatch. The score stands at the last real token. Advantages are whitened "
        "over the whole step, returns are not. Defaults follow `The N+ implementation details` (arXiv:2403.17031): a "
        "reply cut short scores -1 whatever it says."
    )
    differences: ClassVar[tuple[str, ...]] = (
        "TRL's PPO, gone since 1.16, put the score one position after the last token and subtracted a penalty from the "
        "score of a cut reply, off by default.",
        "TRL until 0.9.6: beta 0.2, adaptive to target 6 with horizon 10,000; a mean ratio above 10 skips a minibatch.",
        "OpenRLHF: value clip 0.5, λ 1, one epoch, beta 0.01; it clips the reward after the baseline is subtracted.",
        "verl: value clip 0.5, λ 1, one epoch, beta 0.001, and always a dual clip of 3.",
        "NeMo-RL: clip 0.2 below and 0.28 above in its examples, dual clip 10 as an option, beta 0.",
        "torchtune: its whitening adds the mean back: advantages are scaled, not centred.",
        "HALOs trains on fixed labels, with clip 0.5, γ 0.99 and λ 0.95.",
    )

    def needs(self) -> Needs:
        measured = self.beta and (self.charged == "reward" or self.kl_target is not None)
        wanted = {
            "reference_logps": self.beta,
            "old_logps": measured or not self.on_policy,
            "sampled_logps": self.importance_cap is not None,
            "old_values": True,
        }
        return Needs(
            draws=(Draw(self.n),),
            rows=frozenset({"score", "finished"} if self.truncated in ("replace", "bootstrap") else {"score"}),
            before={name for name, asked in wanted.items() if asked},
            during=frozenset({"logps", "values", "entropy"} if self.entropy else {"logps", "values"}),
        )

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        sequences = super().arrange(rows)
        return [s for s in sequences if s.fields["finished"]] if self.truncated == "drop" else sequences

    # --- before gradients: what each token earned --------------------------------------------------------------------

    def prepare(self, batch: Batch, ctx: StepContext) -> Batch:
        """`advantages` and `returns` [N, T]; `kl_weight` [N] where the divergence is in the loss."""
        weight = self._kl_weight(batch, ctx)
        rewards = at_last(self._shaped(batch, ctx), batch.mask)
        if self.beta and self.charged == "reward":
            rewards = rewards - weight * kl_estimate(batch.old_logps - batch.reference_logps, self.estimator)
        ctx.record("reward/total", batch.sum_tokens(rewards).mean())
        after = batch.last_token(batch.old_values) * (1 - batch.finished) if self.truncated == "bootstrap" else None
        advantages = gae(rewards, batch.old_values, batch.mask, self.discount, self.decay, after)
        returns = advantages + batch.old_values  # before whitening
        if self.whiten_advantages:
            advantages = whiten(advantages, batch.mask)
        _describe(batch, returns, ctx)
        return batch.with_columns(advantages=advantages, returns=returns, kl_weight=weight.expand(len(batch)))

    def _shaped(self, batch: Batch, ctx: StepContext) -> Tensor:
        """The score of each sequence: a cut reply's is replaced, then it is normalised, then clipped. [N]"""
        score = batch.score
        if self.truncated == "replace":
            cut = -1.0 if self.truncated_score is None else self.truncated_score
            score = torch.where(batch.finished > 0, score, cut)
        if self.normalise is not None:
            moments = merged_moments(ctx.state.get("ppo/moments", torch.zeros(3, dtype=torch.double)), score)
            ctx.state["ppo/moments"] = moments
            centre = moments[1].to(score) if self.normalise == "standardise" else 0.0
            score = (score - centre) / moments_std(moments).to(score)
        return score if self.score_clip is None else score.clamp(-self.score_clip, self.score_clip)

    def _kl_weight(self, batch: Batch, ctx: StepContext) -> Tensor:
        """β of this step; with a target, the next step's is adapted to the divergence measured now."""
        weight = ctx.state.get("ppo/beta", torch.tensor(self.beta, dtype=torch.double))
        if self.needs().columns.keys() >= {"old_logps", "reference_logps"}:
            moved = batch.sum_tokens(batch.old_logps - batch.reference_logps)
            ctx.record("kl/sequence", moved.mean())
            ctx.record("kl/token", moved.sum() / batch.lengths.sum().clamp(min=1))
            if self.kl_target is not None:
                ctx.record("kl/weight", weight)
                measured = (moved.mean().double(), self.kl_target, len(batch), self.horizon)
                ctx.state["ppo/beta"] = adapted_coefficient(weight, *measured)
        return weight.to(batch.old_values)

    # --- with gradients ----------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        old = stop_gradient(policy.logps) if self.on_policy else batch.old_logps
        log_ratio = policy.logps - old
        surrogate = clipped_surrogate(log_ratio, batch.advantages, self.clip, self.high, self.dual_clip)
        if self.importance_cap is not None:
            surrogate = surrogate * importance_weight(old - batch.sampled_logps, self.importance_cap)
        errors = clipped_value_loss(policy.values, batch.old_values, batch.returns, self.value_clip)
        parts = {"loss/policy": batch.mean(surrogate, "tokens"), "loss/value": batch.mean(errors, "tokens")}
        total = parts["loss/policy"] + self.value_weight * parts["loss/value"]
        if self.beta and self.charged == "loss":
            parts["loss/kl"] = self._kl(batch, policy)
            total = total + parts["loss/kl"]
        if self.entropy:
            parts["entropy/token"] = batch.mean(policy.entropy, "tokens")
            total = total - self.entropy * parts["entropy/token"]
        metrics = {name: x.detach() for name, x in parts.items()}
        return Loss(total, metrics | self._moved(batch, log_ratio.detach()))

    def _kl(self, batch: Batch, policy: Policy) -> Tensor:
        away = kl_estimate(policy.logps - batch.reference_logps, self.estimator)
        return batch.mean(batch.kl_weight[:, None] * away, "tokens")

    def _moved(self, batch: Batch, log_ratio: Tensor) -> dict[str, Tensor]:
        """How far this step's updates have gone: mean ratio, share of tokens beyond the clip, KL(old || new)."""
        clipped = outside_clip(log_ratio, batch.advantages, self.clip, self.high)
        found = {
            "ratio/mean": ratio_of(log_ratio),
            "ratio/clipped": clipped.to(log_ratio),
            "kl/update": kl_estimate(-log_ratio, "k3"),
        }
        return {name: batch.mean(x, "tokens", weighted=False) for name, x in found.items()}

    def accept(self, metrics: Mapping[str, float]) -> str:
        """`skip` a minibatch whose mean ratio ran away, `stop` a step whose updates have gone far enough."""
        if self.ratio_limit is not None and metrics["ratio/mean"] > self.ratio_limit:
            return "skip"
        return "stop" if self.update_limit is not None and metrics["kl/update"] > self.update_limit else "step"


def _describe(batch: Batch, returns: Tensor, ctx: StepContext) -> None:
    """How well the values of before foretold the returns: 1 is perfectly, 0 no better than their mean."""
    real, missed = returns[batch.mask], (returns - batch.old_values)[batch.mask]
    spread = real.var(correction=0) if len(real) else real.new_zeros(())
    ctx.record("value/explained", 1 - missed.var(correction=0) / spread if spread > 0 else 0.0)
    ctx.record("value/mean", batch.old_values[batch.mask].mean() if len(real) else 0.0)
