from __future__ import annotations

import math

import pytest
import torch
from prefopt_dpo import DPO
from prefopt_dpo.margins import OffsetDPO

from prefopt.api import Batch, Comparison, Completion, DataError, Policy, Role

LENGTHS = [2, 3, 1, 4]
POLICY = [[-0.5, -1.0], [-2.0, -0.1, -0.7], [-0.3], [-1.1, -0.9, -0.2, -0.4]]
REFERENCE = [[-0.7, -1.2], [-1.5, -0.2, -0.6], [-0.9], [-1.0, -1.0, -0.1, -0.8]]


def made() -> tuple[Batch, torch.Tensor]:
    def padded(rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([row + [7.0] * (4 - len(row)) for row in rows], dtype=torch.double)

    batch = Batch.build(
        [[1] * n for n in LENGTHS], role=[Role.CHOSEN, Role.REJECTED, Role.REJECTED, Role.CHOSEN], group=[0, 0, 1, 1]
    ).with_columns(reference_logps=padded(REFERENCE))
    return batch, padded(POLICY)


def ratios() -> list[float]:
    return [sum(p) - sum(r) for p, r in zip(POLICY, REFERENCE, strict=True)]


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_equals_its_definition(beta, smoothing):
    """Equation 7 of the paper, and the conservative form of its label-smoothing note, in plain numbers."""
    batch, logps = made()
    loss = DPO(beta=beta, label_smoothing=smoothing).loss(batch, Policy({"logps": logps}))
    a, b, c, d = ratios()
    expected = 0.0
    for margin in (beta * (a - b), beta * (d - c)):
        win, lose = (math.log(1 + math.exp(-s * margin)) for s in (1, -1))
        expected += (1 - smoothing) * win + smoothing * lose
    assert loss.value.item() == pytest.approx(expected / 2, abs=1e-10)


def test_the_gradient_is_that_of_the_paper():
    """Section 4: -β σ(r_l - r_w) for each token of the chosen completion, its opposite for the rejected one."""
    batch, logps = made()
    logps.requires_grad_()
    DPO(beta=0.5).loss(batch, Policy({"logps": logps})).value.backward()
    a, b, c, d = ratios()
    for chosen, rejected, margin in ((0, 1, a - b), (3, 2, d - c)):
        pull = 0.5 / (1 + math.exp(0.5 * margin)) / 2
        assert logps.grad[chosen, : LENGTHS[chosen]].tolist() == pytest.approx([-pull] * LENGTHS[chosen], abs=1e-10)
        assert logps.grad[rejected, : LENGTHS[rejected]].tolist() == pytest.approx(
            [pull] * LENGTHS[rejected], abs=1e-10
        )


def test_a_policy_equal_to_its_reference_has_loss_log_2_and_no_margin():
    batch, logps = made()
    same = batch.with_columns(reference_logps=logps)
    loss = DPO(beta=3.0).loss(same, Policy({"logps": logps}))
    assert loss.value.item() == pytest.approx(math.log(2), abs=1e-12)
    assert loss.metrics["reward/margin"].item() == 0
    assert loss.metrics["reward/accuracy"].item() == 0.5


def test_swapping_chosen_and_rejected_turns_the_margin_round():
    batch, logps = made()
    turned = Batch.build([[1] * n for n in LENGTHS], role=[2, 1, 1, 2], group=[0, 0, 1, 1], columns=batch.columns)
    one, two = (DPO().loss(b, Policy({"logps": logps})).metrics["reward/margin"].item() for b in (batch, turned))
    assert one == -two != 0


def test_a_margin_without_a_logarithm_is_refused():
    row = Comparison(prompt="p", chosen=Completion("a"), rejected=Completion("b"), margin=0.0)
    with pytest.raises(DataError, match="takes the logarithm of a row's margin, and this one's is 0"):
        OffsetDPO().arrange([row])
