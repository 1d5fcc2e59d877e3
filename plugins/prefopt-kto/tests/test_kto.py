"""What is particular to judgements: probes, one-sided steps, weights that are far from the paper's."""

from __future__ import annotations

import math

import pytest
import torch
from prefopt_kto.methods import BCO, KTO

from prefopt.api import Batch, Completion, Judgement, Policy, Role
from prefopt.testing.engine import trial
from prefopt.testing.synthetic import Synthetic, context


def rows(*said: tuple[str, str]) -> list[Judgement]:
    """(prompt, reply) in turn good and bad."""
    return [
        Judgement(prompt=prompt, completion=Completion(reply), desirable=i % 2 == 0, index=i)
        for i, (prompt, reply) in enumerate(said)
    ]


def probes(method: KTO, made: list[Judgement]) -> list[tuple[str, str, int]]:
    arranged = method.arrange(made)
    return [(str(s.prompt), s.completion.text, s.group) for s in arranged if s.role == Role.PROBE]


def test_each_prompt_meets_the_reply_of_the_row_before_it():
    made = rows(("p", "a"), ("q", "b"), ("r", "c"))
    assert probes(KTO(), made) == [("p", "c", 0), ("q", "a", 1), ("r", "b", 2)]


def test_a_reply_of_another_prompt_is_preferred_and_its_own_is_never_taken():
    pair_and_more = rows(("p", "a"), ("p", "b"), ("q", "a"))
    assert probes(KTO(), pair_and_more) == [("p", "b", 0), ("p", "a", 1), ("q", "b", 2)]
    assert probes(KTO(), rows(("p", "a"), ("p", "b"))) == [("p", "b", 0), ("p", "a", 1)]
    assert probes(KTO(), rows(("p", "a"), ("q", "a"))) == []
    assert probes(KTO(), rows(("p", "a"))) == []


def test_probes_stay_within_the_rows_of_their_z():
    made = rows(("p", "a"), ("q", "b"), ("r", "c"), ("s", "d"))
    assert probes(KTO(kl_rows=2), made) == [("p", "b", 0), ("q", "a", 1), ("r", "d", 2), ("s", "c", 3)]


def batch(roles: list[Role], moved: list[float]) -> Batch:
    """One token each, moved so far from the reference."""
    column = torch.tensor(moved, dtype=torch.double)[:, None]
    half = len(roles) // 2
    group = [*range(half), *range(half)]
    return Batch.build([[1]] * len(roles), role=roles, group=group).with_columns(
        old_logps=column - 1, reference_logps=torch.full_like(column, -1.0)
    )


def divergence(method: KTO, moved: list[float]) -> list[float]:
    roles = [Role.DESIRABLE, Role.UNDESIRABLE, Role.DESIRABLE] + [Role.PROBE] * 3
    return method.prepare(batch(roles, [9.0] * 3 + moved), context()).divergence[:3].tolist()


def test_z_is_the_mean_of_the_probes_and_never_below_zero():
    assert divergence(KTO(), [1.0, 2.0, 6.0]) == [3.0] * 3
    assert divergence(KTO(), [1.0, -9.0, 2.0]) == [0.0] * 3
    assert divergence(KTO(kl_rows=2), [1.0, 2.0, 6.0]) == [1.5, 1.5, 6.0]


def test_rows_that_were_dropped_leave_z_whole():
    """Groups keep their numbers when others are gone."""
    roles = [Role.DESIRABLE, Role.UNDESIRABLE, Role.PROBE, Role.PROBE]
    column = torch.tensor([0.0, 0.0, 1.0, 3.0], dtype=torch.double)[:, None]
    kept = Batch.build([[1]] * 4, role=roles, group=[3, 9, 3, 9]).with_columns(
        old_logps=column, reference_logps=torch.zeros_like(column)
    )
    ctx = context()
    assert KTO().prepare(kept, ctx).divergence.tolist() == [2.0] * 4
    assert ctx.recorded["kl/mismatched"] == 2.0
    assert KTO(kl_rows=4).prepare(kept, context()).divergence.tolist() == [1.0, 3.0, 1.0, 3.0]


@pytest.mark.parametrize(("weights", "start"), [((1.3, 1.3), 0.65), ((1.0, 2.0), None)])
def test_the_loss_at_the_start_follows_the_weights(weights, start):
    assert KTO(desirable_weight=weights[0], undesirable_weight=weights[1]).loss_at_init() == start


def test_bco_s_shift_of_one_class_is_its_mean():
    made = batch([Role.DESIRABLE] * 4, [1.0, 2.0, 3.0, 6.0])
    assert BCO(beta=1.0).prepare(made, context()).shift.tolist() == pytest.approx([3.0] * 4)


@pytest.mark.parametrize("method", [KTO(), BCO()])
@pytest.mark.parametrize("role", [Role.DESIRABLE, Role.UNDESIRABLE])
def test_a_step_of_one_class_is_finite(method, role):
    made = Synthetic.of(method, groups=4)
    one = made.batch.role.clone().fill_(int(role))
    columns = {name: x.clone() for name, x in made.batch.columns.items()}
    whole = Batch(made.batch.ids, made.batch.mask, one, made.batch.group, made.batch.weight, made.batch.counts, columns)
    if isinstance(method, BCO):
        whole = method.prepare(whole, context())
    loss = method.loss(whole, Policy({"logps": made.outputs["logps"]}))
    assert loss.value.isfinite()


@pytest.mark.parametrize(("weight", "said"), [(1.0, False), (2.0, True)])
def test_a_weight_outside_the_paper_s_range_is_said_once(weight, said):
    messages: list[str] = []
    state: dict[str, torch.Tensor] = {}
    roles = [Role.DESIRABLE, Role.UNDESIRABLE] * 64
    for step in range(4):
        ctx = context(state, step)
        ctx.warn = messages.append
        KTO(desirable_weight=weight).prepare(batch(roles, [0.0] * len(roles)), ctx)
    assert len(messages) == said
    assert not said or "desirable rows weigh 2.00 times" in messages[0]


def test_z_moves_the_loss_through_the_engine():
    """With a reference of its own, so that probes have moved: the loss is that of z, and z alone is recorded."""
    found = trial(KTO(), forward="plain").metrics
    assert found["kl/mismatched"] >= 0
    assert math.isfinite(found["loss/total"])
