"""PPO against loops in plain numbers, and what its settings refuse."""

from __future__ import annotations

import math
from statistics import fmean, stdev, variance

import pytest
import torch
from prefopt_ppo import PPO
from pydantic import ValidationError
from torch import Tensor

from prefopt.api import Batch, Completion, Policy, Role, Rollout
from prefopt.testing.synthetic import context

LENGTHS = [3, 1, 4]
SCORES, FINISHED = [1.0, 0.5, 2.0], [1.0, 1.0, 0.0]


def numbers(seed: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.double).tolist() for n in LENGTHS]


OLD, REFERENCE, LIVE, VALUES, OLD_VALUES = (numbers(seed) for seed in range(5))


def column(rows: list[list[float]]) -> Tensor:
    return torch.tensor([[*row, *[9.0] * (4 - len(row))] for row in rows], dtype=torch.double)


def batch() -> Batch:
    made = Batch.build([[1] * n for n in LENGTHS], role=[Role.SAMPLE] * 3, group=[0, 1, 2])
    return made.with_columns(
        score=torch.tensor(SCORES, dtype=torch.double),
        finished=torch.tensor(FINISHED, dtype=torch.double),
        reference_logps=column(REFERENCE),
        old_logps=column(OLD),
        old_values=column(OLD_VALUES),
        sampled_logps=column(REFERENCE),
    )


def prepared(method: PPO, state: dict[str, Tensor] | None = None) -> Batch:
    return method.prepare(batch(), context(state))


def rewards(beta: float, cut: float = -1.0) -> list[list[float]]:
    """-β k1 at each token, and at the last the score; a reply that was cut scores -1."""
    found = [[-beta * (o - r) for o, r in zip(old, ref, strict=True)] for old, ref in zip(OLD, REFERENCE, strict=True)]
    for row, score, finished in zip(found, SCORES, FINISHED, strict=True):
        row[-1] += score if finished else cut
    return found


def advantages(earned: list[list[float]], discount: float, decay: float, after: float = 0.0) -> list[list[float]]:
    found = []
    for row, values in zip(earned, OLD_VALUES, strict=True):
        last, own = 0.0, []
        following = [*values[1:], after]
        for reward, value, later in reversed(list(zip(row, values, following, strict=True))):
            last = reward + discount * later - value + discount * decay * last
            own.insert(0, last)
        found.append(own)
    return found


def real(x: Tensor) -> list[float]:
    return [value for row, n in zip(x.tolist(), LENGTHS, strict=True) for value in row[:n]]


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


@pytest.mark.parametrize("dual", [None, 1.1])
def test_ppo_equals_its_definition(dual):
    """Reward, advantage, whitening, both clips: token by token."""
    method = PPO(beta=0.3, discount=0.9, decay=0.8, clip=0.1, clip_high=0.3, dual_clip=dual, value_clip=0.2)
    made = prepared(method)
    raw = flat(advantages(rewards(0.3), 0.9, 0.8))
    mean, scale = fmean(raw), math.sqrt(variance(raw) + 1e-8)
    loss = errors = 0.0
    for a, old, live, v, v_old in zip(raw, flat(OLD), flat(LIVE), flat(VALUES), flat(OLD_VALUES), strict=True):
        ratio, target, white = math.exp(live - old), a + v_old, (a - mean) / scale
        part = max(-ratio * white, -min(max(ratio, 0.9), 1.3) * white)
        loss += min(part, -dual * white) if dual is not None and white < 0 else part
        near = min(max(v, v_old - 0.2), v_old + 0.2)
        errors += max((v - target) ** 2, (near - target) ** 2) / 2
    found = method.loss(made, Policy({"logps": column(LIVE), "values": column(VALUES)}))
    assert real(made.returns) == pytest.approx([a + v for a, v in zip(raw, flat(OLD_VALUES), strict=True)], abs=1e-10)
    assert found.metrics["loss/policy"].item() == pytest.approx(loss / 8, abs=1e-10)
    assert found.metrics["loss/value"].item() == pytest.approx(errors / 8, abs=1e-10)
    assert found.value.item() == pytest.approx(loss / 8 + 0.1 * errors / 8, abs=1e-10)


def test_kl_in_the_loss_and_the_entropy_bonus_are_means_over_tokens():
    method = PPO(beta=0.3, kl_in="loss", kl_estimator="k3", entropy=0.5)
    made = prepared(method)
    live = Policy({"logps": column(LIVE), "values": column(VALUES), "entropy": column(VALUES)})
    gaps = [p - r for p, r in zip(flat(LIVE), flat(REFERENCE), strict=True)]
    found = method.loss(made, live)
    assert found.metrics["loss/kl"].item() == pytest.approx(0.3 * fmean(math.exp(-x) - 1 + x for x in gaps), abs=1e-10)
    without = PPO(beta=0.0).loss(made, live).value - 0.5 * fmean(flat(VALUES))
    assert found.value.item() == pytest.approx(without.item() + found.metrics["loss/kl"].item(), abs=1e-10)


def test_the_first_minibatch_has_ratio_one_and_nothing_clipped():
    for method, logps in ((PPO(), column(OLD)), (PPO(inner_epochs=1), column(LIVE))):
        metrics = method.loss(prepared(method), Policy({"logps": logps, "values": column(VALUES)})).metrics
        assert metrics["ratio/mean"].item() == pytest.approx(1.0, abs=1e-15)
        assert metrics["ratio/clipped"].item() == metrics["kl/update"].item() == 0


def test_truncated_importance_weights_multiply_the_surrogate():
    method = PPO(importance_cap=1.5, inner_epochs=1)
    found = method.loss(prepared(method), Policy({"logps": column(LIVE), "values": column(VALUES)}))
    weights = [min(math.exp(p - s), 1.5) for p, s in zip(flat(LIVE), flat(REFERENCE), strict=True)]
    expected = -fmean(w * a for w, a in zip(weights, real(prepared(method).advantages), strict=True))
    assert found.metrics["loss/policy"].item() == pytest.approx(expected, abs=1e-10)


# --- replies that were cut ------------------------------------------------------------------------------------------


def test_a_cut_reply_may_keep_its_score_or_be_taken_to_go_on():
    plain = {"beta": 0.0, "whiten_advantages": False, "decay": 0.8}
    kept = [*flat(advantages(rewards(0.0, cut=2.0), 1.0, 0.8))]
    assert real(prepared(PPO(truncated="end", **plain)).advantages) == pytest.approx(kept, abs=1e-10)
    ahead = advantages(rewards(0.0, cut=2.0), 1.0, 0.8, after=OLD_VALUES[2][-1])[2]
    found = real(prepared(PPO(truncated="bootstrap", **plain)).advantages)
    assert found == pytest.approx(kept[:4] + ahead, abs=1e-10)


def test_a_cut_reply_can_be_left_out():
    rows = [Rollout(prompt="p", completions=(Completion("a", score=1.0), Completion("b", finished=False, score=2.0)))]
    assert [s.completion.text for s in PPO(truncated="drop").arrange(rows)] == ["a"]
    assert len(PPO().arrange(rows)) == 2


def test_a_score_is_replaced_then_normalised_then_clipped_and_then_pays_for_kl():
    method = PPO(beta=0.3, normalise="standardise", score_clip=1.0, whiten_advantages=False, decay=0.0, discount=0.0)
    state: dict[str, Tensor] = {}
    prepared(method, state)
    made = method.prepare(batch().with_columns(score=torch.tensor([4.0, 0.0, 9.0], dtype=torch.double)), context(state))
    seen = [1.0, 0.5, -1.0, 4.0, 0.0, -1.0]
    scores = [min(max((x - fmean(seen)) / (stdev(seen) + 1e-8), -1.0), 1.0) for x in (4.0, 0.0, -1.0)]
    last = [0.3 * (old[-1] - ref[-1]) for old, ref in zip(OLD, REFERENCE, strict=True)]
    expected = [score - paid for score, paid in zip(scores, last, strict=True)]
    found = [row[n - 1] for row, n in zip(made.returns.tolist(), LENGTHS, strict=True)]
    assert found == pytest.approx(expected, abs=1e-10)


# --- between steps --------------------------------------------------------------------------------------------------


def test_beta_follows_the_divergence_of_whole_replies():
    method, state = PPO(beta=0.2, kl_target=0.5, kl_horizon=30), {}
    moved = fmean(sum(old) - sum(ref) for old, ref in zip(OLD, REFERENCE, strict=True))
    error = min(max(moved / 0.5 - 1, -0.2), 0.2)
    recorded = []
    for _ in range(2):
        ctx = context(state)
        made = method.prepare(batch(), ctx)
        recorded.append((ctx.recorded["kl/weight"], made.kl_weight.tolist()))
    later = 0.2 * (1 + error * 3 / 30)
    assert recorded[0] == (0.2, [0.2] * 3)
    assert recorded[1] == (pytest.approx(later, abs=1e-12), pytest.approx([later] * 3, abs=1e-12))
    assert ctx.recorded["kl/sequence"] == pytest.approx(moved, abs=1e-12)
    assert ctx.recorded["kl/token"] == pytest.approx(moved * 3 / 8, abs=1e-12)


def test_a_runaway_ratio_skips_a_minibatch_and_a_long_way_ends_the_step():
    guarded = PPO(ratio_limit=10.0, update_limit=0.02)
    assert guarded.accept({"ratio/mean": 11.0, "kl/update": 1.0}) == "skip"
    assert guarded.accept({"ratio/mean": 1.0, "kl/update": 0.03}) == "stop"
    assert guarded.accept({"ratio/mean": 1.0, "kl/update": 0.01}) == "step"
    assert PPO().accept({"ratio/mean": 1e9, "kl/update": 1e9}) == "step"


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.0, "kl_in": "loss"}, "kl_in mean nothing without beta"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "k1 in the loss has no gradient"),
        ({"kl_horizon": 10}, "kl_horizon means nothing without kl_target"),
        ({"truncated": "drop", "truncated_score": -1.0}, "means nothing with truncated: drop"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        PPO(**settings)


def test_nothing_is_computed_that_is_not_used():
    assert set(PPO().needs().columns) == {"old_logps", "old_values", "reference_logps"}
    assert set(PPO(beta=0.0, inner_epochs=1).needs().columns) == {"old_values"}
    assert set(PPO(kl_in="loss", inner_epochs=1).needs().columns) == {"old_values", "reference_logps"}
    assert PPO(truncated="end").needs().rows == {"score"}
