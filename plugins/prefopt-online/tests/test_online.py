"""The methods against plain numbers, and the exact gradient they are samples of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from statistics import fmean, pstdev, stdev, variance

import pytest
import torch
from prefopt_online import METHODS
from prefopt_online.base import SampleMethod
from prefopt_online.groups import BNPO, DAPO, GRPO, RLOO, DrGRPO
from prefopt_online.preferences import RAFT, REBEL, XPO, AStarPO, IterativeDPO, NashMD, OnlineDPO
from prefopt_online.ratios import CISPO, GMPO, GSPO, SAPO
from prefopt_online.reinforce import Reinforce, ReinforcePlusPlus, ReinforcePlusPlusBaseline, ReMax
from pydantic import ValidationError
from torch import Tensor

from prefopt.api import Batch, Completion, Policy, Role, Rollout, RolloutAlgorithm
from prefopt.testing.kit import EXACT
from prefopt.testing.synthetic import Synthetic, context

LENGTHS = [3, 1, 4, 2, 2]
GROUPS = [0, 0, 0, 1, 1]
SCORES = [1.0, 0.5, 2.0, -1.0, 0.25]


def numbers(seed: int, scale: float = 1.0) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator, dtype=torch.double) * scale).tolist() for n in LENGTHS]


OLD, REFERENCE, LIVE, SAMPLED = (numbers(seed, 0.5) for seed in range(4))
RATIOS = [[math.exp(p - o) for p, o in zip(live, old, strict=True)] for live, old in zip(LIVE, OLD, strict=True)]


def column(rows: list[list[float]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[9.0] * (longest - len(row))] for row in rows], dtype=torch.double)


def batch(**fields: list[float]) -> Batch:
    made = Batch.build([[1] * n for n in LENGTHS], role=[Role.SAMPLE] * 5, group=GROUPS)
    given = {name: torch.tensor(x, dtype=torch.double) for name, x in {"score": SCORES, **fields}.items()}
    given |= {"old_logps": column(OLD), "reference_logps": column(REFERENCE), "sampled_logps": column(SAMPLED)}
    return made.with_columns(**given)


def first_advantages(method: SampleMethod, **fields: list[float]) -> list[float]:
    return method.prepare(batch(**fields), context()).advantages[:, 0].tolist()


def loss(method: SampleMethod, **fields: list[float]) -> float:
    made = method.prepare(batch(**fields), context())
    return method.loss(made, Policy({"logps": column(LIVE)})).value.item()


def of_group(i: int, values: list[float]) -> list[float]:
    return [x for x, group in zip(values, GROUPS, strict=True) if group == GROUPS[i]]


def moved() -> list[float]:
    return [sum(old) - sum(ref) for old, ref in zip(OLD, REFERENCE, strict=True)]


STANDARD = [
    (score - fmean(of_group(i, SCORES))) / (stdev(of_group(i, SCORES)) + 1e-4) for i, score in enumerate(SCORES)
]

# --- advantages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (GRPO(), STANDARD),
        (
            GRPO(scale="population_std"),
            [(x - fmean(of_group(i, SCORES))) / (pstdev(of_group(i, SCORES)) + 1e-4) for i, x in enumerate(SCORES)],
        ),
        (DrGRPO(), [x - fmean(of_group(i, SCORES)) for i, x in enumerate(SCORES)]),
        (Reinforce(beta=0.0), SCORES),
    ],
    ids=["grpo", "population", "dr_grpo", "reinforce"],
)
def test_advantages_are_their_definitions(method, expected):
    assert first_advantages(method) == pytest.approx(expected, abs=1e-10)


def test_leaving_one_out_pays_for_kl_first():
    rewards = [score - 0.3 * away for score, away in zip(SCORES, moved(), strict=True)]
    others = [(sum(of_group(i, rewards)) - x) / (len(of_group(i, rewards)) - 1) for i, x in enumerate(rewards)]
    expected = [x - other for x, other in zip(rewards, others, strict=True)]
    assert first_advantages(RLOO(beta=0.3)) == pytest.approx(expected, abs=1e-10)
    sizes = [len(of_group(i, SCORES)) for i in range(5)]
    centred = [x - fmean(of_group(i, rewards)) for i, x in enumerate(rewards)]
    assert expected == pytest.approx([k / (k - 1) * x for k, x in zip(sizes, centred, strict=True)], abs=1e-12)


def test_the_running_baseline_is_that_of_the_steps_before():
    method, state, found = Reinforce(beta=0.0, memory=0.75), {}, []
    for scores in (SCORES, [2 * x for x in SCORES], SCORES):
        made = method.prepare(batch(score=scores), context(state))
        found.append(scores[0] - made.advantages[0, 0].item())
    mean = fmean(SCORES)
    assert found == pytest.approx([0.0, mean, 0.75 * mean + 0.25 * 2 * mean], abs=1e-12)


def test_reinforce_plus_plus_whitens_what_follows_each_token():
    paid = [[0.3 * (o - r) for o, r in zip(old, ref, strict=True)] for old, ref in zip(OLD, REFERENCE, strict=True)]
    returns = [score - sum(row[t:]) for score, row in zip(SCORES, paid, strict=True) for t in range(len(row))]
    expected = [(x - fmean(returns)) / math.sqrt(variance(returns) + 1e-8) for x in returns]
    made = ReinforcePlusPlus(beta=0.3).prepare(batch(), context())
    assert made.advantages[made.mask].tolist() == pytest.approx(expected, abs=1e-10)


def test_its_baseline_form_subtracts_the_group_s_mean_before():
    centred = [x - fmean(of_group(i, SCORES)) for i, x in enumerate(SCORES)]
    tokens = [x for x, n in zip(centred, LENGTHS, strict=True) for _ in range(n)]
    expected = [(x - fmean(tokens)) / math.sqrt(variance(tokens) + 1e-8) for x in centred]
    assert first_advantages(ReinforcePlusPlusBaseline()) == pytest.approx(expected, abs=1e-10)


def test_scores_of_others_are_baselines():
    greedy, opponent = [0.3] * 5, [1.0, 1.0, 1.0, 0.0, 0.0]
    assert first_advantages(ReMax(beta=0.0), baseline=greedy) == pytest.approx([x - 0.3 for x in SCORES], abs=1e-12)
    expected = [1 / (1 + math.exp(-(x - y) / 2)) - 0.5 for x, y in zip(SCORES, opponent, strict=True)]
    found = first_advantages(NashMD(beta=0.0, temperature=2.0), opponent=opponent)
    assert found == pytest.approx(expected, abs=1e-12)


def soft_punishment(length: int, most: float, cushion: float) -> float:
    """Equation 13 of DAPO's paper."""
    if length <= most - cushion:
        return 0.0
    return ((most - cushion) - length) / cushion if length <= most else -1.0


@pytest.mark.parametrize(("overlong", "cushion"), [(22, 9), (22, 22), (21, None), (1, 1)])
def test_a_long_reply_loses_up_to_one_point(overlong, cushion):
    """From every length up to beyond the limit; a fifth of it is the cushion unless one is given."""
    sizes = range(1, 26)
    scores = [0.1 * n for n in sizes]
    made = Batch.build([[1] * n for n in sizes], role=[Role.SAMPLE] * 25, group=[0] * 25)
    made = made.with_columns(score=torch.tensor(scores, dtype=torch.double))
    lost = [soft_punishment(n, overlong, cushion or overlong / 5) for n in sizes]
    found = DAPO(overlong=overlong, cushion=cushion).worth(made)
    assert found.tolist() == pytest.approx([x + y for x, y in zip(scores, lost, strict=True)], abs=1e-10)


def test_the_advantage_is_of_the_score_that_length_has_lowered():
    rewards = [score + soft_punishment(n, 4, 3) for score, n in zip(SCORES, LENGTHS, strict=True)]
    expected = [x - fmean(of_group(i, rewards)) for i, x in enumerate(rewards)]
    assert first_advantages(DAPO(overlong=4, cushion=3, scale="none")) == pytest.approx(expected, abs=1e-10)


# --- objectives -----------------------------------------------------------------------------------------------------


def surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    return max(-ratio * advantage, -min(max(ratio, 1 - low), 1 + high) * advantage)


def tokens(each: Callable[[float, float, float], float]) -> list[list[float]]:
    """`each(ratio, advantage, log-probability)` of every token."""
    return [
        [each(r, a, p) for r, p in zip(ratios, live, strict=True)]
        for ratios, live, a in zip(RATIOS, LIVE, STANDARD, strict=True)
    ]


def of_means(rows: list[list[float]]) -> float:
    return fmean(fmean(row) for row in rows)


def of_tokens(rows: list[list[float]]) -> float:
    return fmean(x for row in rows for x in row)


def k3() -> list[list[float]]:
    pairs = [zip(live, ref, strict=True) for live, ref in zip(LIVE, REFERENCE, strict=True)]
    return [[math.exp(r - p) - 1 + p - r for p, r in row] for row in pairs]


CLIPPED = tokens(lambda r, a, p: surrogate(r, a, 0.2, 0.2))
GATE = tokens(lambda r, a, p: -a * 4 / (t := 1.0 if a > 0 else 1.05) / (1 + math.exp(-t * (r - 1))))
MEANS = [math.exp(fmean(math.log(r) for r in row)) for row in RATIOS]
GEOMETRIC = [
    -a * math.exp(fmean(min(math.log(r), 0.4) if a > 0 else max(math.log(r), -0.4) for r in row))
    for row, a in zip(RATIOS, STANDARD, strict=True)
]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (GRPO(inner_epochs=2), of_means(CLIPPED) + 0.04 * of_means(k3())),
        (BNPO(inner_epochs=2), of_tokens(CLIPPED) + 0.04 * of_tokens(k3())),
        (DAPO(inner_epochs=2), of_tokens(tokens(lambda r, a, p: surrogate(r, a, 0.2, 0.28)))),
        (DrGRPO(inner_epochs=2, scale="std", length=16), fmean(sum(row) / 16 for row in CLIPPED)),
        (
            GSPO(inner_epochs=2),
            fmean(surrogate(r, a, 3e-4, 4e-4) for r, a in zip(MEANS, STANDARD, strict=True)),
        ),
        (GMPO(inner_epochs=2), fmean(GEOMETRIC)),
        (CISPO(inner_epochs=2, cap=1.5), of_tokens(tokens(lambda r, a, p: -min(r, 1.5) * a * p))),
        (SAPO(inner_epochs=2), of_means(GATE)),
    ],
    ids=lambda x: x.name if isinstance(x, SampleMethod) else "",
)
def test_objectives_are_their_definitions(method, expected):
    assert loss(method) == pytest.approx(expected, abs=1e-10)


def test_rloo_clips_the_ratio_of_a_whole_completion():
    advantages = first_advantages(RLOO(beta=0.3))
    whole = [math.prod(row) for row in RATIOS]
    expected = fmean(surrogate(r, a, 0.2, 0.2) for r, a in zip(whole, advantages, strict=True))
    assert loss(RLOO(beta=0.3, inner_epochs=2)) == pytest.approx(expected, abs=1e-10)


CAP = 1.1


def capped(log_gap: float) -> float:
    return min(math.exp(log_gap), CAP)


def gaps(trainer: list[list[float]]) -> list[list[float]]:
    """The trainer's log-probability less the sampler's, of every token."""
    return [[p - s for p, s in zip(own, drawn, strict=True)] for own, drawn in zip(trainer, SAMPLED, strict=True)]


def weighed(rows: list[list[float]], trainer: list[list[float]]) -> list[list[float]]:
    return [
        [capped(g) * x for g, x in zip(gap, row, strict=True)] for gap, row in zip(gaps(trainer), rows, strict=True)
    ]


WHOLE = [capped(sum(row)) for row in gaps(OLD)]
GAINS = [[-score * p for p in row] for score, row in zip(SCORES, LIVE, strict=True)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (GRPO(inner_epochs=2, importance_cap=CAP), of_means(weighed(CLIPPED, OLD)) + 0.04 * of_means(k3())),
        (BNPO(minibatches=2, importance_cap=CAP, beta=0.0), of_tokens(weighed(CLIPPED, OLD))),
        (Reinforce(beta=0.0, importance_cap=CAP), fmean(sum(row) for row in weighed(GAINS, LIVE))),
        (
            GSPO(inner_epochs=2, importance_cap=CAP),
            fmean(w * surrogate(r, a, 3e-4, 4e-4) for w, r, a in zip(WHOLE, MEANS, STANDARD, strict=True)),
        ),
        (
            GMPO(inner_epochs=2, importance_cap=CAP),
            fmean(w * x for w, x in zip(WHOLE, GEOMETRIC, strict=True)),
        ),
    ],
    ids=lambda x: x.name if isinstance(x, SampleMethod) else "",
)
def test_a_sampler_that_is_not_quite_the_policy_is_made_up_for_up_to_a_cap(method, expected):
    """Token by token, or where a loss is that of a completion by the sum over it; the KL of a loss is not weighed."""
    assert loss(method) == pytest.approx(expected, abs=1e-10)


def test_some_of_these_weights_are_capped_and_others_are_not():
    for log_gaps in (gaps(OLD), gaps(LIVE), [[sum(row) for row in gaps(OLD)]]):
        assert {capped(g) == CAP for row in log_gaps for g in row} == {True, False}


def test_no_gradient_flows_through_the_weight():
    method = Reinforce(beta=0.0, importance_cap=CAP)
    logps = column(LIVE).requires_grad_()
    method.loss(method.prepare(batch(), context()), Policy({"logps": logps})).value.backward()
    for i, row in enumerate(gaps(LIVE)):
        expected = [-SCORES[i] * capped(g) / len(SCORES) for g in row]
        assert logps.grad[i, : LENGTHS[i]].tolist() == pytest.approx(expected, abs=1e-10)


# --- the gradient they are samples of -------------------------------------------------------------------------------

REWARD = [0.3, -0.4, 1.1]
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double).log()


def exact(free: Tensor, beta: float) -> Tensor:
    """The gradient of -(E[r] - β KL)."""
    logps = torch.log_softmax(free, -1)
    value = (logps.exp() * (torch.tensor(REWARD, dtype=torch.double) - beta * (logps - PRIOR))).sum()
    return -torch.autograd.grad(value, free)[0]


def expected_gradient(method: SampleMethod, free: Tensor, n: int, **fields: list[float]) -> Tensor:
    """The mean of the method's gradient over all ways to draw `n` of three completions of one token."""
    total = torch.zeros(3, dtype=torch.double)
    for drawn in product(range(3), repeat=n):
        logps = torch.log_softmax(free, -1)
        made = Batch.build([[1]] * n, role=[Role.SAMPLE] * n, group=[0] * n).with_columns(
            score=torch.tensor([REWARD[i] for i in drawn], dtype=torch.double),
            old_logps=logps[list(drawn)].detach()[:, None],
            reference_logps=PRIOR[list(drawn)][:, None],
            **{name: torch.tensor(x * n, dtype=torch.double) for name, x in fields.items()},
        )
        value = method.loss(method.prepare(made, context()), Policy({"logps": logps[list(drawn)][:, None]})).value
        weight = logps[list(drawn)].sum().exp().detach()
        total += weight * torch.autograd.grad(value, free)[0]
    return total


@pytest.mark.parametrize(
    ("method", "n", "fields"),
    [
        (RLOO(beta=0.2), 3, {}),
        (RLOO(beta=0.2, inner_epochs=2), 2, {}),
        (RLOO(beta=0.2, kl_in="loss", kl_estimator="k2"), 2, {}),
        (Reinforce(beta=0.2), 1, {}),
        (ReMax(beta=0.2), 2, {"baseline": [0.7]}),
    ],
    ids=lambda x: x.name if isinstance(x, SampleMethod) else "",
)
def test_the_expected_gradient_is_that_of_reward_minus_kl(method, n, fields):
    free = torch.tensor([0.3, -1.0, 0.9], dtype=torch.double, requires_grad=True)
    found = expected_gradient(method, free, n, **fields)
    assert found.tolist() == pytest.approx(exact(free, 0.2).tolist(), abs=1e-12)


def test_the_group_s_own_mean_shrinks_the_gradient_by_one_part_in_n():
    free = torch.tensor([0.3, -1.0, 0.9], dtype=torch.double, requires_grad=True)
    found = expected_gradient(GRPO(scale="none", kl_in="reward", beta=0.2), free, 3)
    assert found.tolist() == pytest.approx((2 / 3 * exact(free, 0.2)).tolist(), abs=1e-12)


# --- what is drawn, kept and compared --------------------------------------------------------------------------------


def row(*drawn: tuple[str, float, Role]) -> Rollout:
    completions = tuple(Completion(text, score=score) for text, score, _ in drawn)
    return Rollout(prompt="p", completions=completions, roles=tuple(role for *_, role in drawn))


def texts(method: RolloutAlgorithm, *rows: Rollout) -> list[tuple[str, str, int]]:
    return [(s.role.name.lower(), s.completion.text, s.group) for s in method.arrange(rows)]


OWN, OTHER = Role.SAMPLE, Role.OPPONENT


@pytest.mark.parametrize("method", [OnlineDPO(), IterativeDPO()])
def test_the_best_is_chosen_over_the_worst_unless_they_are_equal(method):
    three = row(("a", 1.0, OWN), ("b", 3.0, OWN), ("c", 0.0, OWN))
    tie, same = row(("a", 1.0, OWN), ("b", 1.0, OWN)), row(("a", 1.0, OWN), ("a", 2.0, OWN))
    assert texts(method, tie, three, same) == [("chosen", "b", 1), ("rejected", "c", 1)]


def test_raft_keeps_the_first_of_the_best():
    assert texts(RAFT(), row(("a", 1.0, OWN), ("b", 3.0, OWN), ("c", 3.0, OWN))) == [("sample", "b", 0)]


def test_rebel_compares_its_two_samples_even_if_equal():
    assert len(texts(REBEL(), row(("a", 1.0, OWN), ("b", 1.0, OWN)))) == 2
    assert texts(REBEL(), row(("a", 1.0, OWN))) == []


def test_opponents_lend_their_scores_and_are_not_trained_on():
    made = row(("a", 1.0, OWN), ("b", 3.0, OWN), ("c", 0.5, OTHER))
    for method, field in ((ReMax(), "baseline"), (NashMD(), "opponent")):
        found = method.arrange([made])
        assert [(s.completion.text, s.fields[field]) for s in found] == [("a", 0.5), ("b", 0.5)]
        assert method.arrange([row(("a", 1.0, OWN))]) == []


def test_xpo_says_which_of_a_pair_the_reference_drew():
    found = XPO().arrange([row(("a", 1.0, OWN), ("b", 3.0, OTHER)), row(("a", 2.0, OWN), ("b", 1.0, OTHER))])
    assert [(s.role.name, s.completion.text, s.fields["reference"]) for s in found] == [
        ("CHOSEN", "b", 1.0),
        ("REJECTED", "a", 0.0),
        ("CHOSEN", "a", 0.0),
        ("REJECTED", "b", 1.0),
    ]


def test_the_best_value_within_reach_is_a_soft_maximum():
    (found,) = AStarPO(value_beta=0.5).arrange(
        [row(("a", 9.0, OWN), *((c, x, OTHER) for c, x in (("b", 1), ("c", 2))))]
    )
    assert found.fields["value"] == pytest.approx(0.5 * math.log((math.exp(2) + math.exp(4)) / 2), abs=1e-12)


def learned(method: RolloutAlgorithm, *rows: Rollout) -> float:
    """The loss of rows whose completions `a` to `e` are as long and as likely as the five above."""
    sequences = method.arrange(rows)
    places = ["abcde".index(s.completion.text) for s in sequences]
    old, reference, live = (column([x[i] for i in places]) for x in (OLD, REFERENCE, LIVE))
    fields = {name: [s.fields[name] for s in sequences] for name in method.needs().rows}
    made = Batch.build(
        [[1] * LENGTHS[i] for i in places], role=[s.role for s in sequences], group=[s.group for s in sequences]
    ).with_columns(
        old_logps=old,
        reference_logps=reference,
        **{name: torch.tensor(x, dtype=torch.double) for name, x in fields.items()},
    )
    return method.loss(method.prepare(made, context()), Policy({"logps": live})).value.item()


def likelihood(text: str, since: list[list[float]] | None = None) -> float:
    """The log-probability of a completion, or by how much it has grown."""
    i = "abcde".index(text)
    return sum(LIVE[i]) - (sum(since[i]) if since else 0.0)


def rho(text: str) -> float:
    return likelihood(text, REFERENCE)


def dpo(beta: float, better: str, worse: str) -> float:
    return math.log(1 + math.exp(-beta * (rho(better) - rho(worse))))


def test_raft_imitates_the_best_token_by_token():
    """One mean over all tokens of `c` and `d`, and not the mean of two means."""
    rows = row(("a", 1.0, OWN), ("b", 0.5, OWN), ("c", 2.0, OWN)), row(("d", 0.25, OWN), ("e", -1.0, OWN))
    kept = [*LIVE[2], *LIVE[3]]
    assert learned(RAFT(), *rows) == pytest.approx(-sum(kept) / len(kept), abs=1e-10)


@pytest.mark.parametrize("method", [OnlineDPO(beta=0.3), IterativeDPO(beta=0.3)], ids=lambda m: m.name)
def test_online_dpo_is_the_loss_of_dpo_on_the_best_and_the_worst(method):
    rows = row(("a", 1.0, OWN), ("b", 0.5, OWN)), row(("c", 0.0, OWN), ("d", 3.0, OWN), ("e", 1.0, OWN))
    expected = (dpo(0.3, "a", "b") + dpo(0.3, "d", "c")) / 2
    assert learned(method, *rows) == pytest.approx(expected, abs=1e-10)


def test_xpo_adds_a_bonus_for_leaving_what_the_reference_said():
    """Algorithm 1 of the paper: α log π of the reference's sample, whether that is the better one or the worse one."""
    rows = row(("a", 1.0, OWN), ("b", 3.0, OTHER)), row(("c", 2.0, OWN), ("d", -1.0, OTHER))
    expected = (dpo(0.3, "b", "a") + 0.2 * likelihood("b") + dpo(0.3, "c", "d") + 0.2 * likelihood("d")) / 2
    assert learned(XPO(beta=0.3, alpha=0.2), *rows) == pytest.approx(expected, abs=1e-10)


def test_rebel_regresses_the_difference_of_scores_on_that_of_log_ratios():
    """Algorithm 1 of the paper. On samples of the policy itself nothing has moved yet; equal scores are kept."""
    rows = row(("a", 1.0, OWN), ("b", 3.0, OWN)), row(("c", 2.0, OWN), ("d", 2.0, OWN))
    x = {text: likelihood(text, OLD) for text in "abcd"}
    expected = (((x["a"] - x["b"]) / 0.7 - (1.0 - 3.0)) ** 2 + ((x["c"] - x["d"]) / 0.7 - 0.0) ** 2) / 2
    assert learned(REBEL(eta=0.7, inner_epochs=2), *rows) == pytest.approx(expected, abs=1e-10)
    assert learned(REBEL(eta=0.7), *rows) == pytest.approx((1.0 - 3.0) ** 2 / 2, abs=1e-10)


def test_a_star_po_regresses_log_ratios_on_what_is_above_the_best_value():
    rows = (
        row(("a", 1.0, OWN), ("b", 1.0, OTHER), ("c", 2.0, OTHER), ("e", -0.5, OTHER)),
        row(("d", -1.0, OWN), ("e", 0.25, OTHER)),
    )
    first = 0.5 * math.log((math.exp(1.0 / 0.5) + math.exp(2.0 / 0.5) + math.exp(-0.5 / 0.5)) / 3)
    expected = ((0.3 * rho("a") - (1.0 - first)) ** 2 + (0.3 * rho("d") - (-1.0 - 0.25)) ** 2) / 2
    assert learned(AStarPO(value_beta=0.5, beta=0.3), *rows) == pytest.approx(expected, abs=1e-10)


def test_dapo_keeps_groups_it_can_learn_from():
    even, uneven = row(("a", 1.0, OWN), ("b", 1.0, OWN)), row(("a", 1.0, OWN), ("b", 0.0, OWN))
    assert [DAPO().keep(r) for r in (even, uneven)] == [False, True]
    assert DAPO(dynamic_sampling=False).keep(even)
    assert GRPO().keep(even)


# --- all of them ----------------------------------------------------------------------------------------------------


def test_no_two_methods_are_the_same_with_the_same_number_of_samples():
    """In a second pass, with four samples, or what else they draw, for every prompt. Iterative DPO is the exception:
    online DPO with more samples and, through the reference, with rounds."""
    seen: dict[str, float] = {}
    for method in METHODS:
        own = method(inner_epochs=2, **({"n": 4} if "n" in method.model_fields and method is not IterativeDPO else {}))
        made = Synthetic.of(own)
        seen[method.name] = own.loss(made.batch, Policy(made.outputs)).value.item()
    values = sorted(seen.values())
    assert len(METHODS) == 20
    assert min(b - a for a, b in pairwise(values)) > EXACT, seen


@pytest.mark.parametrize("method", [m for m in METHODS if issubclass(m, SampleMethod)], ids=lambda m: m.name)
def test_idle_samples_can_be_left_out(method):
    """Loss and gradient are the same without them."""
    own = method(beta=0.0)
    made = Synthetic.of(own)
    advantages = made.batch.advantages.clone()
    advantages[made.batch.group == 2] = 0.0
    made = replace(made, batch=made.batch.with_columns(advantages=advantages))
    idle = own.idle(made.batch)
    assert idle[made.batch.group == 2].all()
    assert not idle.all()
    kept = (~idle).nonzero().squeeze(1).tolist()
    logps = made.outputs["logps"].requires_grad_()
    whole = own.loss(made.batch, Policy({"logps": logps})).value
    part = own.loss(made.batch.select(kept), Policy({"logps": logps[kept][:, : int(made.batch.extents[kept].max())]}))
    assert part.value.item() == pytest.approx(whole.item(), abs=1e-12)
    slopes = [torch.autograd.grad(x, logps)[0] for x in (whole, part.value)]
    assert torch.allclose(*slopes, rtol=1e-12, atol=1e-15)


def test_nothing_is_idle_while_kl_is_in_the_loss():
    assert GRPO().idle(GRPO().prepare(batch(score=[1.0] * 5), context())) is None
    assert GRPO(beta=0.0).idle(GRPO(beta=0.0).prepare(batch(score=[1.0] * 5), context())).all()


@pytest.mark.parametrize("settings", [{"beta": 0.0, "kl_in": "loss"}, {"kl_in": "reward", "kl_estimator": "k3"}])
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(ValidationError, match="kl_estimator"):
        GRPO(**settings)


def test_what_is_on_policy_asks_for_no_pass_of_the_old_policy():
    assert set(GRPO().needs().columns) == {"reference_logps"}
    assert set(GRPO(beta=0.0).needs().columns) == set()
    assert set(GRPO(minibatches=2, beta=0.0).needs().columns) == {"old_logps"}
    assert set(RLOO().needs().columns) == {"old_logps", "reference_logps"}
