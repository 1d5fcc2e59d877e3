"""Where the numbers of each offline method come from.

Every loss that TRL 1.16 has too is compared with what its trainers computed (see record_losses.py), from the same token
log-probabilities; so are the cases where a peer computes something else, with what and why: by their outputs where
recorded, else by their formulas (peers.json). The others are held to an optimum, an exact gradient, an enumeration or,
where a paper gives nothing but its formula, to that formula typed again (`regression`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.api import Algorithm, Batch, Policy, Role, Rollout
from prefopt.plugins import load
from prefopt.testing.synthetic import context

RECORD = json.loads((Path(__file__).parent / "trl_losses.json").read_text("utf-8"))
LOSSES, INPUTS = RECORD["losses"], RECORD["inputs"]
PEERS = json.loads((Path(__file__).parent / "peers.json").read_text("utf-8"))
SAME = [name for name in LOSSES if "," not in name]


@pytest.fixture(scope="module")
def plugins():
    return load()


def made(plugins: Any, name: str) -> Algorithm:
    """`dpo beta=0.5` -> the algorithm with these settings."""
    name, *settings = name.split()
    values = (s.partition("=")[::2] for s in settings)
    numbers = {key: json.loads(x) if x[0].isdigit() else x for key, x in values}
    return plugins.find("algorithm", name).model_validate(numbers)


def padded(rows: list[list[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [9.0] * (width - len(row)) for row in rows], dtype=torch.double)


def batch_of(rows: list[list[float]], role: list[int], group: list[int], **columns: list[list[float]]) -> Batch:
    tensors = {name: padded(values) for name, values in columns.items()}
    return Batch.build([[1] * len(row) for row in rows], role=role, group=group, columns=tensors)


def pairs(recorded: Mapping[str, Any]) -> tuple[Batch, Policy]:
    """TRL's batches hold the chosen sides first, the rejected ones behind them."""
    rows, half = recorded["logps"], len(recorded["logps"]) // 2
    role = [Role.CHOSEN] * half + [Role.REJECTED] * half
    columns = {"reference_logps": recorded["reference"]} if "reference" in recorded else {}
    batch = batch_of(rows, role, [*range(half), *range(half)], **columns)
    outputs = {"logps": padded(rows)}
    if "collision" in recorded:
        outputs["collision_entropy"] = padded(recorded["collision"])
    return batch, Policy(outputs)


def judgements(recorded: Mapping[str, Any], algorithm: Algorithm) -> tuple[Batch, Policy]:
    """Each row with its probe, where the method asks for one."""
    role = [Role.DESIRABLE if label else Role.UNDESIRABLE for label in recorded["label"]]
    rows, reference, group = recorded["logps"], recorded["reference"], [*range(len(role))]
    probed = "old_logps" in algorithm.needs().columns
    if probed:
        rows, reference = rows + recorded["probe_logps"], reference + recorded["probe_reference"]
        role, group = role + [Role.PROBE] * len(role), group * 2
    batch = algorithm.prepare(batch_of(rows, role, group, reference_logps=reference, old_logps=rows), context())
    return batch.select(batch.trained), Policy({"logps": padded(recorded["logps"])})


def demonstrations(recorded: Mapping[str, Any]) -> tuple[Batch, Policy]:
    rows = recorded["logps"]
    return batch_of(rows, [Role.DEMONSTRATION] * len(rows), [*range(len(rows))]), Policy({"logps": padded(rows)})


def loss_on(plugins: Any, name: str, recorded: Mapping[str, Any]) -> float:
    algorithm = made(plugins, name)
    match algorithm.eats.kind:
        case "judgement":
            batch, policy = judgements(recorded, algorithm)
        case "comparison":
            batch, policy = pairs(recorded)
        case _:
            batch, policy = demonstrations(recorded)
    return algorithm.loss(batch, policy).value.item()


def computed(plugins: Any, name: str) -> float:
    """The loss on what TRL's was recorded on; that of methods that sort a batch's pairs is on pairs worth sorting."""
    algorithm = made(plugins, name)
    compared = "crossed pairs" if algorithm.coupled else "pairs" if algorithm.needs().reference else "free pairs"
    inputs = {"judgement": "judgements", "comparison": compared, "demonstration": "demonstrations"}
    return loss_on(plugins, name, INPUTS[inputs[algorithm.eats.kind]])


def recorded_loss(name: str) -> Any:
    return pytest.approx(LOSSES[name], rel=1e-6)


@pytest.mark.parametrize("name", SAME)
def test_the_loss_is_that_of_trl(plugins, name):
    """That of `rpo` is the mean of what TRL computes for each pair by itself, where its two dialects are one."""
    assert computed(plugins, name) == recorded_loss(name)


@pytest.mark.parametrize("name", [name for name in SAME if name.startswith("aot")])
def test_the_recorded_pairs_tell_aot_from_a_loss_that_does_not_sort(plugins, name):
    """Which is `dpo`, paired or not."""
    unsorted = loss_on(plugins, " ".join(["dpo", *name.split()[1:]]), INPUTS["crossed pairs"])
    assert abs(unsorted - LOSSES[name]) > 1e-3


def test_orpo_over_the_whole_sequence_is_that_of_trl(plugins):
    """Its likelihood is one mean over the tokens of prompts and chosen responses."""
    recorded = INPUTS["free pairs"]
    half = len(recorded["prompts"])
    role = [Role.CHOSEN] * half + [Role.REJECTED] * half + [Role.OPENING] * half
    rows = recorded["logps"] + recorded["prompts"]
    batch = batch_of(rows, role, [*range(half)] * 3)
    loss = made(plugins, "orpo nll=sequence").loss(batch, Policy({"logps": padded(rows)}))
    assert loss.value.item() == recorded_loss("orpo, whole sequence")


def test_orpo_s_odds_are_those_of_trl_whose_likelihood_covers_the_prompt(plugins):
    """TRL: NLL over prompt and response. Here, by default, over the response, so only the odds agree."""
    batch, policy = pairs(INPUTS["free pairs"])
    loss = made(plugins, "orpo").loss(batch, policy)
    assert (loss.value - loss.metrics["loss/nll"]).item() == recorded_loss("orpo, odds")
    assert abs(loss.value.item() - LOSSES["orpo, whole sequence"]) > 1e-3


def test_trl_ignores_label_smoothing_where_here_it_is_conservative_dpo(plugins):
    assert LOSSES["cdpo, ignored"] == LOSSES["dpo"]
    assert abs(computed(plugins, "cdpo") - LOSSES["cdpo, ignored"]) > 1e-3


def test_trl_s_simpo_has_a_likelihood_and_another_scale(plugins):
    """`loss_type: simpo` there is β 0.1, γ 0.5 and α 1: cpo_simpo."""
    assert abs(computed(plugins, "simpo") - LOSSES["simpo, by default"]) > 1e-3
    assert computed(plugins, "cpo_simpo beta=0.1") == recorded_loss("simpo, by default")


def test_summed_ipo_is_averaged_ipo_of_a_beta_as_many_times_larger_as_there_are_tokens(plugins):
    """OpenRLHF and the original DPO repository sum, TRL averages: (n d - 1/2β)² = n² (d - 1/2nβ)²."""
    rows, reference = [[-1.0] * 200, [-1.0] * 200], [[-1.03] * 200, [-1.01] * 200]
    recorded = {"logps": rows, "reference": reference}
    summed, averaged = loss_on(plugins, "ipo length=sum", recorded), loss_on(plugins, "ipo", recorded)
    assert summed == pytest.approx((200 * 0.02 - 5) ** 2, rel=1e-12)
    assert averaged == pytest.approx((0.02 - 5) ** 2, rel=1e-12)
    assert summed == pytest.approx(200**2 * loss_on(plugins, "ipo beta=20", recorded), rel=1e-12)


def test_ld_dpo_on_one_side_only_is_not_log_2_at_the_start(plugins):
    """LLaMA-Factory and ms-swift weigh the policy's tail, not the reference's."""
    batch, policy = pairs(INPUTS["pairs"])
    same = batch.with_columns(reference_logps=policy.logps)
    assert made(plugins, "ld_dpo").loss(same, policy).value.item() == pytest.approx(math.log(2), abs=1e-12)
    ours = made(plugins, "ld_dpo")
    place = batch.mask.cumsum(1) - 1
    shared = torch.minimum(*batch.pairs(batch.lengths)).repeat(2)[:, None]
    theirs = batch.sum_tokens(policy.logps * torch.where(place < shared, 1.0, ours.alpha)) - batch.sum_tokens(
        policy.logps
    )
    chosen, rejected = batch.pairs(ours.beta * theirs)
    loss = torch.nn.functional.softplus(rejected - chosen).mean()
    assert abs(loss.item() - math.log(2)) > 1e-3


def test_a_low_margin_makes_trl_s_discopop_undefined_and_not_ours(plugins):
    """e^(-u) is infinite below -88 in float32, and its weight is 0 there."""
    u = torch.tensor([-100.0])
    weight = torch.sigmoid(u / 0.05)
    assert (torch.exp(-u) * weight).isnan().all()
    method = made(plugins, "discopop")
    assert method.pair_loss(u, torch.zeros(1)).item() == pytest.approx(100.0)


def test_log1p_of_exp_makes_llama_factory_s_orpo_infinite_and_not_ours(plugins):
    batch = batch_of([[-1e-9], [-1.0]], [Role.CHOSEN, Role.REJECTED], [0, 0])
    logps = torch.tensor([[-1e-9], [-1.0]])
    assert torch.log1p(-torch.exp(logps[0])).isinf().all()
    assert made(plugins, "orpo").loss(batch, Policy({"logps": logps})).value.isfinite()


def test_the_count_of_moved_tokens_makes_halos_s_ipo_undefined_at_the_start_and_not_ours(plugins):
    batch, policy = pairs(INPUTS["pairs"])
    same = batch.with_columns(reference_logps=policy.logps)
    ratio = policy.logps - same.reference_logps
    assert (ratio.sum(1) / (ratio != 0).sum(1)).isnan().all()
    assert made(plugins, "ipo").loss(same, policy).value.item() == pytest.approx(25.0)


# --- peers' dialects: ours, theirs and why, in peers.json -------------------------------------------------------------


def mean_nll(margins: list[float]) -> float:
    return sum(math.log(1 + math.exp(-m)) for m in margins) / len(margins)


def pairwise(values: list[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))


def log_ratios(policy: list[list[float]], reference: list[list[float]]) -> list[float]:
    return [sum(p) - sum(r) for p, r in zip(policy, reference, strict=True)]


def sides(recorded: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The log-ratios of both sides of each pair."""
    found = log_ratios(recorded["logps"], recorded["reference"])
    return list(zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True))


def shifted_bco(recorded: Mapping[str, Any]) -> float:
    seen = sides(recorded["before"]) + sides(recorded)
    shift = sum(0.1 * (a + b) / 2 for a, b in seen) / len(seen)
    now = [(0.1 * a - shift, 0.1 * b - shift) for a, b in sides(recorded)]
    return mean_nll([a for a, _ in now]) + mean_nll([-b for _, b in now])


def summed_wpo(recorded: Mapping[str, Any]) -> float:
    ((chosen, rejected),) = sides(recorded)
    return math.exp(sum(map(sum, recorded["logps"]))) * mean_nll([0.1 * (chosen - rejected)])


def inverse_alpha(recorded: Mapping[str, Any]) -> float:
    return mean_nll([0.1 * (math.exp(-0.25 * b) - math.exp(-0.25 * a)) / 0.25 for a, b in sides(recorded)])


def token_rpo(recorded: Mapping[str, Any]) -> float:
    chosen = [x for row in recorded["logps"][: len(recorded["logps"]) // 2] for x in row]
    return mean_nll([0.1 * (a - b) for a, b in sides(recorded)]) - sum(chosen) / len(chosen)


def moved_kto(recorded: Mapping[str, Any]) -> float:
    moved = [x for x in log_ratios(recorded["probe_logps"], recorded["probe_reference"]) if x != 0]
    z = max(0.0, sum(moved) / len(moved))
    own = zip(log_ratios(recorded["logps"], recorded["reference"]), recorded["label"], strict=True)
    heights = [0.1 * (x - z) * (1 if good else -1) for x, good in own]
    return sum(1 / (1 + math.exp(h)) for h in heights) / len(heights)


def sigmoid_hinge(recorded: Mapping[str, Any]) -> float:
    return mean_nll([0.1 * (a - b) for a, b in sides(recorded)])


DIALECTS = {
    "bco_pair": shifted_bco,
    "wpo": summed_wpo,
    "f_dpo divergence=alpha alpha=0.25": inverse_alpha,
    "rpo": token_rpo,
    "kto": moved_kto,
    "hinge": sigmoid_hinge,
}


@pytest.mark.parametrize("entry", PEERS, ids=[entry["method"].split()[0] for entry in PEERS])
def test_a_peer_s_dialect_has_another_value_than_ours(plugins, entry):
    assert loss_on(plugins, entry["method"], entry["inputs"]) == pytest.approx(entry["ours"], rel=1e-6)
    assert DIALECTS[entry["method"]](entry["inputs"]) == pytest.approx(entry["theirs"], rel=1e-6)
    assert abs(entry["ours"] - entry["theirs"]) > 1e-3


# --- methods that no peer computes ------------------------------------------------------------------------------------

ORACLES = {
    "optimum": {"cdpo"},
    "gradient": {"bco"},
    "enumeration": {"pro", "sampo"},
    "oracle": {"reward_model", "reward_model_listwise"},  # tests/builtin/test_algorithms.py
    "regression": {"r_dpo", "odpo", "dpo_positive", "tdpo1", "tdpo2", "beta_dpo", "slic_hf", "rrhf"},
}
PEER = {name for name in SAME if " " not in name} | {"orpo"}  # with its defaults; of orpo's, the odds
LENGTHS = [3, 2, 1, 4, 2, 2]
LOGPS = [[-0.5, -1.0, -0.2], [-2.0, -0.1], [-0.3], [-1.1, -0.9, -0.2, -0.4], [-0.8, -0.6], [-1.5, -0.7]]
REFERENCE = [[-0.7, -1.2, -0.1], [-1.5, -0.2], [-0.9], [-1.0, -1.0, -0.1, -0.8], [-0.4, -0.5], [-1.0, -1.9]]
DIVERGENCE = [[0.1, 0.2, 0.0], [0.4, 0.3], [0.05], [0.2, 0.2, 0.3, 0.1], [0.0, 0.1], [0.6, 0.2]]
RATIO = [sum(p) - sum(r) for p, r in zip(LOGPS, REFERENCE, strict=True)]
SUM = [sum(row) for row in LOGPS]
KL = [sum(row) for row in DIVERGENCE]
MARGINS = [0.5, 1.5, 3.0]


def test_every_offline_method_has_an_oracle_and_few_only_a_retyped_formula(plugins):
    offline = {e.cls.name for e in plugins.registry.all() if issubclass(e.cls, Algorithm) and e.cls.eats is not Rollout}
    assert offline == PEER.union(*ORACLES.values())
    assert len(ORACLES["regression"]) <= 8
    assert len(offline) >= 35


def three_pairs() -> tuple[Batch, Policy]:
    batch = batch_of(LOGPS, [Role.CHOSEN, Role.REJECTED] * 3, [0, 0, 1, 1, 2, 2], reference_logps=REFERENCE)
    margin = torch.tensor(MARGINS, dtype=torch.double).repeat_interleave(2)
    batch = batch.with_columns(margin=margin, old_logps=padded(LOGPS))
    return batch, Policy({"logps": padded(LOGPS), "token_kl": padded(DIVERGENCE)})


EXPECTED = {
    "r_dpo alpha=0.05": lambda: mean_nll(
        [0.1 * (a - b) + 0.05 * (n - m) for (a, b), (n, m) in zip(pairwise(RATIO), pairwise(LENGTHS), strict=True)]
    ),
    "odpo alpha=0.5": lambda: mean_nll(
        [0.1 * (a - b) - 0.5 * math.log(m) for (a, b), m in zip(pairwise(RATIO), MARGINS, strict=True)]
    ),
    "dpo_positive penalty=7": lambda: mean_nll([0.1 * (a - b - 7 * max(0.0, -a)) for a, b in pairwise(RATIO)]),
    "tdpo1": lambda: mean_nll(
        [0.1 * (a - b) - 0.1 * (d - c) for (a, b), (c, d) in zip(pairwise(RATIO), pairwise(KL), strict=True)]
    ),
    "tdpo2 alpha=0.3": lambda: mean_nll(
        [0.1 * (a - b) - 0.03 * (d - c) for (a, b), (c, d) in zip(pairwise(RATIO), pairwise(KL), strict=True)]
    ),
    "slic_hf penalty=0.2": lambda: sum(max(0.0, 1 - a + b) - 0.2 * a for a, b in pairwise(SUM)) / 3,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_regression_over_pairs(plugins, name):
    batch, policy = three_pairs()
    assert made(plugins, name).loss(batch, policy).value.item() == pytest.approx(EXPECTED[name](), abs=1e-12)


def test_tdpo2_takes_the_chosen_side_s_divergence_as_a_constant(plugins):
    for name, moved in (("tdpo1", True), ("tdpo2", False)):
        batch, policy = three_pairs()
        kl = policy.token_kl.requires_grad_()
        made(plugins, name).loss(batch, Policy({**policy.outputs, "token_kl": kl})).value.backward()
        assert bool((kl.grad[::2] != 0).any()) is moved
        assert (kl.grad[1::2][batch.mask[1::2]] > 0).all()  # the rejected side's may not grow


def test_regression_beta_dpo_over_two_steps(plugins):
    """The first step sets the moments; in the second beta moves by their distance, and `keep` 1 keeps every pair."""
    method = made(plugins, "beta_dpo keep=1 alpha=0.5 momentum=0.9")
    batch, policy = three_pairs()
    first = [0.1 * (a - b) for a, b in pairwise(RATIO)]
    state: dict[str, Tensor] = {}
    assert method.loss(method.prepare(batch, context(state)), policy).value.item() == pytest.approx(mean_nll(first))
    scaled = batch.with_columns(old_logps=3 * batch.old_logps, reference_logps=3 * batch.reference_logps)
    prepared = method.prepare(scaled, context(state))
    mean = sum(first) / 3
    beta = 0.1 * (1 + 0.5 * (3 * mean - mean))
    assert prepared.step_beta.tolist() == pytest.approx([beta] * 6, abs=1e-12)
    assert state["beta_dpo/margin"].item() == pytest.approx(0.9 * mean + 0.1 * 3 * mean, abs=1e-12)


def test_beta_dpo_leaves_out_the_unusual(plugins):
    """Of many pairs, one of which is far away, a step keeps the share asked for, and hardly ever that one."""
    method = made(plugins, "beta_dpo keep=0.8")
    rows = [[-1.0 - (i % 3) / 10] for i in range(19)] + [[-90.0]]
    role, group = [Role.CHOSEN, Role.REJECTED] * 20, [i // 2 for i in range(40)]
    logps = [row for chosen in rows for row in (chosen, [-1.0])]
    batch = batch_of(logps, role, group, reference_logps=[[-1.0]] * 40, old_logps=logps)
    left_out = 0
    for step in range(50):
        share = method.prepare(batch, context({}, step)).share[::2]
        assert (share > 0).sum() == 16
        assert share.sum().item() == pytest.approx(20)
        left_out += bool(share[-1] == 0)
    assert left_out == 50


def test_cdpo_has_its_minimum_where_the_label_s_odds_are(plugins):
    """E. Mitchell's note: the loss is least at a margin of log((1-ε)/ε)."""
    method = made(plugins, "cdpo label_smoothing=0.2")
    margin = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.double, requires_grad=True)
    method.pair_loss(margin, torch.zeros(1, dtype=torch.double)).sum().backward()
    assert margin.grad.abs().item() < 1e-15


def test_bco_has_the_gradient_of_a_classifier_and_the_mean_of_all_rewards_so_far(plugins):
    """∂L/∂r = -σ(δ - r) for good replies, σ(r - δ) for bad ones; δ is the mean of the two classes' means."""
    method = made(plugins, "bco beta=0.5")
    role = [Role.DESIRABLE, Role.UNDESIRABLE, Role.DESIRABLE, Role.DESIRABLE, Role.UNDESIRABLE, Role.DESIRABLE]
    batch = batch_of(LOGPS, role, [*range(6)], reference_logps=REFERENCE, old_logps=LOGPS)
    other = batch.with_columns(old_logps=2 * batch.old_logps)
    state: dict[str, Tensor] = {}
    method.prepare(other, context(state))
    prepared = method.prepare(batch, context(state))
    before = [0.5 * (2 * sum(p) - sum(r)) for p, r in zip(LOGPS, REFERENCE, strict=True)]
    reward = [0.5 * x for x in RATIO]
    good = [r for rs in (before, reward) for r, k in zip(rs, role, strict=True) if k == Role.DESIRABLE]
    bad = [r for rs in (before, reward) for r, k in zip(rs, role, strict=True) if k == Role.UNDESIRABLE]
    shift = (sum(good) / len(good) + sum(bad) / len(bad)) / 2
    assert prepared.shift.tolist() == pytest.approx([shift] * 6, abs=1e-12)
    logps = padded(LOGPS).requires_grad_()
    method.loss(prepared, Policy({"logps": logps})).value.backward()
    for i, r in enumerate(reward):
        sign = -1 if role[i] == Role.DESIRABLE else 1
        slope = sign / (1 + math.exp(-sign * (r - shift))) * 0.5 / 6
        assert logps.grad[i, : LENGTHS[i]].tolist() == pytest.approx([slope] * LENGTHS[i], abs=1e-12)


def ranked(order: tuple[int, ...], places: list[int]) -> tuple[Batch, Policy]:
    rows = [LOGPS[i] for i in order]
    batch = batch_of(rows, [Role.RANKED] * len(rows), [0] * len(rows))
    return batch.with_columns(rank=torch.tensor(places, dtype=torch.double)), Policy({"logps": padded(rows)})


def test_pro_s_rankings_are_a_distribution(plugins):
    """Over all orders of four completions the probabilities sum to 1, the likelihood of the best left out."""
    method = made(plugins, "pro beta=0.25")
    total = 0.0
    for order in permutations(range(4)):
        batch, policy = ranked(order, [0, 1, 2, 3])
        best = sum(LOGPS[order[0]]) / LENGTHS[order[0]]
        total += math.exp(-(method.loss(batch, policy).value.item() + 0.25 * best))
    assert total == pytest.approx(1, abs=1e-12)


def test_pro_with_scores_is_sharper_the_further_apart_they_are(plugins):
    """Two completions: -log σ((p_1 - p_2)(r_1 - r_2)), both at the temperature 1/(r_1 - r_2)."""
    batch, policy = ranked((0, 1), [0, 1])
    method = made(plugins, "pro temperature=scores")
    for gap in (0.5, 2.0):
        scored = batch.with_columns(score=torch.tensor([gap, 0.0], dtype=torch.double))
        p = [sum(LOGPS[i]) / LENGTHS[i] for i in (0, 1)]
        expected = math.log(1 + math.exp(-gap * (p[0] - p[1]))) - 0.05 * p[0]
        assert method.loss(scored, policy).value.item() == pytest.approx(expected, abs=1e-12)


def test_regression_rrhf_with_a_tie(plugins):
    batch, policy = ranked((0, 1, 4, 5), [0, 1, 1, 2])
    p = [sum(LOGPS[i]) / LENGTHS[i] for i in (0, 1, 4, 5)]
    places = [0, 1, 1, 2]
    hinge = sum(max(0.0, p[j] - p[i]) for i in range(4) for j in range(4) if places[i] < places[j])
    loss = made(plugins, "rrhf").loss(batch, policy)
    assert loss.value.item() == pytest.approx(hinge - SUM[0], abs=1e-12)
    right = [(p[i] > p[j]) for i in range(4) for j in range(4) if places[i] < places[j]]
    assert loss.metrics["reward/accuracy"].item() == pytest.approx(sum(right) / 5, abs=1e-12)


def test_sampo_draws_every_set_of_tokens_alike(plugins):
    """Of four tokens beside one, each is drawn in a quarter of the steps; equal lengths are dpo."""
    method, steps = made(plugins, "sampo"), 4000
    batch, _ = three_pairs()
    counts = torch.zeros(4)
    for step in range(steps):
        drawn = method.prepare(batch, context({}, step)).drawn
        assert sorted(drawn[3].tolist()) == [0, 1, 2, 3]
        counts += drawn[3] == 0
    chi_squared = ((counts - steps / 4) ** 2 / (steps / 4)).sum().item()
    assert chi_squared < 16.3  # p > 0.001 for three degrees of freedom
    even = batch_of(LOGPS[4:], [Role.CHOSEN, Role.REJECTED], [0, 0], reference_logps=REFERENCE[4:])
    policy = Policy({"logps": padded(LOGPS[4:])})
    expected = made(plugins, "dpo").loss(even, policy).value.item()
    assert method.loss(method.prepare(even, context()), policy).value.item() == pytest.approx(expected, abs=1e-12)


def test_sampo_takes_the_tokens_it_drew(plugins):
    method = made(plugins, "sampo beta=1.0")
    batch, policy = three_pairs()
    prepared = method.prepare(batch, context())
    sizes = [min(pair) for pair in pairwise(LENGTHS) for _ in range(2)]
    ratio = [
        sum(p - r for p, r, place in zip(LOGPS[i], REFERENCE[i], prepared.drawn[i].tolist(), strict=False) if place < n)
        for i, n in enumerate(sizes)
    ]
    assert method.loss(prepared, policy).value.item() == pytest.approx(
        mean_nll([a - b for a, b in pairwise(ratio)]), abs=1e-12
    )
