from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefopt.batch import Batch, Needs, Policy, StepContext
from prefopt.errors import MissingColumn, PluginError
from prefopt.rows import Role

PAIRS = Batch.build(
    [[1, 2], [3], [4, 5, 6], [7, 8]],
    role=[Role.CHOSEN, Role.REJECTED, Role.REJECTED, Role.CHOSEN],
    group=[0, 0, 1, 1],
)


def test_build_pads_on_the_right_and_counts():
    assert PAIRS.ids.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6], [7, 8, 0]]
    assert PAIRS.mask.sum(1).tolist() == [2, 1, 3, 2]
    expected = {"tokens": 8, "sequences": 4, "pairs": 2, "groups": 2, "chosen_tokens": 4, "tokens/REJECTED": 4}
    assert {name: PAIRS.counts[name] for name in expected} == expected


def test_probes_are_counted_nowhere_and_seen_by_no_loss():
    roles = [Role.DESIRABLE, Role.PROBE, Role.UNDESIRABLE, Role.PROBE]
    batch = Batch.build([[1, 2], [3], [4], [5, 6, 7]], role=roles, group=[0, 0, 1, 2])
    assert batch.trained == [0, 2]
    assert [batch.counts[unit] for unit in ("tokens", "sequences", "groups")] == [3, 2, 2]
    assert batch.select(batch.trained).mean(torch.ones(2), "sequences") == 1


def test_a_mean_over_the_tokens_of_some_roles():
    batch = Batch.build([[1, 2], [3], [4, 5, 6]], role=[Role.CHOSEN, Role.REJECTED, Role.OPENING], group=[0, 0, 0])
    x = torch.tensor([[1.0, 2, 9], [100, 9, 9], [4, 5, 6]])
    assert batch.mean(x, "tokens", roles=(Role.CHOSEN, Role.OPENING)) == pytest.approx((1 + 2 + 4 + 5 + 6) / 5)
    part = batch.select([0, 1])
    assert part.mean(x[:2, :2], "tokens", roles=(Role.CHOSEN, Role.OPENING)) == pytest.approx(3 / 5)


def test_reductions_ignore_padding():
    x = torch.tensor([[1.0, 2, 99], [3, 99, 99], [4, 5, 6], [7, 8, 99]])
    assert PAIRS.sum_tokens(x).tolist() == [3, 3, 15, 15]
    assert PAIRS.mean_tokens(x).tolist() == [1.5, 3, 5, 7.5]
    assert PAIRS.last_token(x).tolist() == [2, 3, 6, 8]


def test_reductions_of_an_empty_completion_are_zero():
    batch = Batch.build([[], [1]], role=[0, 0], group=[0, 1])
    x = torch.tensor([[5.0], [7.0]])
    assert batch.sum_tokens(x).tolist() == [0, 7]
    assert batch.mean_tokens(x).tolist() == [0, 7]


def test_pairs_are_matched_by_group_whatever_the_order():
    chosen, rejected = PAIRS.pairs(torch.tensor([0.0, 1, 2, 3]))
    assert chosen.tolist() == [0, 3]
    assert rejected.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("roles", "groups"),
    [([1, 1], [0, 0]), ([1, 2], [0, 1]), ([1, 2, 1, 2], [0, 0, 0, 0]), ([1], [0])],
    ids=["two chosen", "apart", "two pairs", "alone"],
)
def test_groups_without_exactly_one_pair_are_refused(roles, groups):
    batch = Batch.build([[1]] * len(roles), role=roles, group=groups)
    with pytest.raises(PluginError, match="exactly one chosen and one rejected"):
        batch.pairs(torch.zeros(len(roles)))


def test_by_group_lays_members_out_in_order_and_fills():
    batch = Batch.build([[1]] * 5, role=[Role.RANKED] * 5, group=[7, 3, 7, 7, 3])
    x = torch.arange(5.0)
    assert batch.by_group(x, fill=-1).tolist() == [[1, 4, -1], [0, 2, 3]]
    assert batch.ranked(x).tolist() == [[1, 4, 0], [0, 2, 3]]
    with pytest.raises(PluginError, match="rankings"):
        PAIRS.ranked(torch.zeros(4))


@pytest.mark.parametrize(
    ("unit", "shape", "expected"),
    [("tokens", (4, 3), 8 / 8), ("sequences", (4,), 1.0), ("pairs", (2,), 1.0), ("groups", (2,), 1.0)],
)
def test_mean_divides_by_the_count_of_its_unit(unit, shape, expected):
    assert float(PAIRS.mean(torch.ones(shape), unit)) == expected
    assert float(PAIRS.mean(torch.full((4, 3), 2.0), "chosen_tokens")) == 2.0


def test_mean_of_a_part_divides_by_the_count_of_the_whole():
    part = PAIRS.select([2, 3])
    assert float(part.mean(torch.ones(1), "pairs")) == 0.5
    assert float(part.mean(torch.ones(2, 3), "tokens")) == 5 / 8


def test_weights_multiply_and_do_not_change_the_count():
    batch = Batch.build([[1], [2, 3]], role=[0, 0], group=[0, 1], weight=[3.0, 0.0])
    assert float(batch.mean(torch.tensor([1.0, float("nan")]), "sequences")) == 1.5
    assert float(batch.mean(torch.ones(2, 2), "tokens")) == 1.0
    assert float(batch.mean(torch.tensor([2.0, 5.0]), "groups")) == 3.0


@pytest.mark.parametrize(
    ("unit", "shape"), [("tokens", (4,)), ("sequences", (4, 3)), ("pairs", (4,)), ("groups", (3,))]
)
def test_a_shape_that_does_not_fit_its_unit_is_refused(unit, shape):
    with pytest.raises(PluginError, match="needs shape"):
        PAIRS.mean(torch.ones(shape), unit)


def test_an_unknown_unit_is_refused_with_a_suggestion():
    with pytest.raises(PluginError, match="Did you mean `tokens`"):
        PAIRS.mean(torch.ones(4), "token")


def test_select_keeps_counts_and_cuts_padding():
    part = PAIRS.with_columns(a=torch.arange(4.0), b=torch.ones(4, 3)).select([1, 0])
    assert part.ids.tolist() == [[3, 0], [1, 2]]
    assert (part.a.tolist(), tuple(part.b.shape)) == ([1, 0], (2, 2))
    assert part.counts == PAIRS.counts


def test_metrics_do_not_count_weights():
    batch = replace(PAIRS, weight=torch.full((4,), 2.0))
    reward = torch.tensor([1.0, 0.0, 1.0, 3.0])
    assert batch.pair_metrics(reward)["reward/accuracy"] == 1.0
    assert batch.mean(reward, "sequences", weighted=False) == reward.mean()
    assert batch.mean(reward, "sequences") == 2 * reward.mean()


def test_pair_metrics_count_a_tie_as_one_half():
    metrics = PAIRS.pair_metrics(torch.tensor([1.0, 1.0, 0.0, 5.0]))
    assert {k: float(v) for k, v in metrics.items()} == {
        "reward/accuracy": 0.75,
        "reward/margin": 2.5,
        "reward/chosen": 3.0,
        "reward/rejected": 0.5,
    }


def test_an_undeclared_column_names_its_cure():
    with pytest.raises(MissingColumn, match=r'Needs\(before=\{"reference_logps"\}\)'):
        _ = PAIRS.reference_logps
    with pytest.raises(MissingColumn, match=r'Needs\(rows=\{"margin"\}\)'):
        _ = PAIRS.margin


def test_an_undeclared_live_output_names_its_cure():
    policy = Policy({"logps": torch.zeros(1)})
    assert policy.logps.tolist() == [0]
    with pytest.raises(MissingColumn, match=r'Needs\(during=\{"values"\}\)'):
        _ = policy.values
    with pytest.raises(MissingColumn, match="Did you mean `logps`"):
        _ = policy.logp


def test_needs_take_sets_or_roles():
    needs = Needs(before={"old_logps": {Role.PROBE}}, rows={"margin"}, during={"logps"})
    assert needs.columns == {"old_logps": frozenset({Role.PROBE})}
    assert Needs(before={"reference_logps"}).columns["reference_logps"] == frozenset(Role)


def test_needs_refuse_what_the_engine_does_not_have():
    with pytest.raises(PluginError, match="Did you mean `reference_logps`") as caught:
        Needs(before={"reference_logp"}, during={"logp"})
    assert len(caught.value.problems) == 2


def test_a_context_records_and_gives_named_generators():
    ctx = StepContext(3, {}, lambda purpose: torch.Generator().manual_seed(len(purpose)))
    ctx.record("kl", torch.tensor(0.5))
    assert ctx.recorded == {"kl": 0.5}
    assert ctx.key("abc").initial_seed() == 3


def test_turns_of_others_between_trained_tokens_count_for_nothing():
    """A completion with a gap: its means skip the gap, and its end is where its last trained token is."""
    trained = [[True, False, False, True], None]
    batch = Batch.build([[5, 6, 7, 8], [5, 6]], [0, 0], [0, 1], trained=trained)
    x = torch.tensor([[1.0, 20.0, 30.0, 4.0], [6.0, 7.0, 0.0, 0.0]])
    assert batch.sum_tokens(x).tolist() == [5.0, 13.0]
    assert batch.mean_tokens(x).tolist() == [2.5, 6.5]
    assert batch.last_token(x).tolist() == [4.0, 7.0]
    assert batch.counts["tokens"] == 4
    assert batch.mean(x, "tokens").item() == 4.5
    assert batch.select([0]).ids.tolist() == [[5, 6, 7, 8]]
