"""The bandit's sums against enumeration by hand, and its replies against what a model of it can say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch

from prefopt.bench.worlds.bandit import (
    END,
    LETTERS,
    LONGEST,
    VOCABULARY,
    Bandit,
    BanditGap,
    BanditReward,
    Exact,
    replies,
    worth,
)
from prefopt.builtin.samplers import Plain
from prefopt.data.render import Renderer
from prefopt.engine.measure import Measured
from prefopt.engine.models import build, open_model
from prefopt.engine.rollout import draw
from prefopt.engine.services import EngineServices
from prefopt.errors import ConfigError
from prefopt.maths import kl_estimate
from prefopt.rows import Completion, Prompt, Rollout

REWARDS = [1.0, -0.5, 0.25]
REFERENCE = [0.2, 0.5, 0.3]
POLICY = [0.6, 0.1, 0.3]


def exact(policy: list[float], beta: float = 0.4) -> Exact:
    return Exact([math.log(p) for p in policy], [math.log(q) for q in REFERENCE], REWARDS, beta)


def test_the_sums_are_those_of_the_definitions():
    found = exact(POLICY)
    assert found.mass == pytest.approx(1, abs=1e-12)
    assert found.reward == pytest.approx(0.6 - 0.05 + 0.075, abs=1e-12)
    assert found.start == pytest.approx(0.2 - 0.25 + 0.075, abs=1e-12)
    kl = 0.6 * math.log(3) + 0.1 * math.log(0.2)
    assert found.kl == pytest.approx(kl, abs=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.4, 3.0])
def test_nothing_is_better_than_the_optimum_which_the_tilted_reference_reaches(beta):
    weights = [q * math.exp(r / beta) for q, r in zip(REFERENCE, REWARDS, strict=True)]
    best = exact([w / sum(weights) for w in weights], beta)
    assert best.reward - beta * best.kl == pytest.approx(best.optimum, abs=1e-12)
    other = exact(POLICY, beta)
    assert other.reward - beta * other.kl < other.optimum


def test_replies_are_all_there_is_to_say_and_each_is_said_once():
    found = list(replies())
    assert len(found) == len({c.ids for c in found}) == 1 + 4 + 4**2 + 4**3
    assert all((c.ids[-1] == END) == c.finished and END not in c.ids[:-1] for c in found)
    assert {len(c.ids) for c in found if not c.finished} == {LONGEST}


def test_rewards_are_known_for_every_reply_and_missing_for_anything_else():
    groups = [Rollout(prompt="a", completions=(Completion("bd"), Completion(""), Completion("abcda"), Completion("x")))]
    (scores,) = BanditReward().score(groups)
    assert scores[0].value == worth("a", "bd") != worth("b", "bd")
    assert scores[1].value == 0.0
    assert [s.value for s in scores[2:]] == [None, None]
    assert "no reply to 'a'" in scores[2].reason


class Uniform:
    """A subject whose policy says every token with the same probability, and whose reference is itself."""

    def mean_logps(self, rollouts):
        return [[-math.log(len(VOCABULARY))] * len(group.completions) for group in rollouts]

    def log_ratios(self, rollouts):
        return [[0.0] * len(group.completions) for group in rollouts]


def test_the_reference_itself_has_closed_nothing():
    found = BanditGap(beta=1.0).evaluate(Uniform())
    assert found["gap_closed"] == pytest.approx(0, abs=1e-12)
    assert found["exact_kl"] == 0


@pytest.fixture(scope="module", params=[0.1, 0.25], ids=["as built", "far from the reference"])
def measured(request, tmp_path_factory) -> tuple[list[Rollout], list[float], Mapping[str, float]]:
    """Four thousand draws of a policy, the log-ratio of each, and the exact sums. A policy of larger weights is further
    from the reference: KL is 1.8 nats then, and 0.7 otherwise."""
    folder, recipe = tmp_path_factory.mktemp("bandit"), Bandit().recipe()
    scaled = replace(recipe, config={**recipe.config, "initializer_range": request.param})
    for name, made, seed in (("policy", scaled, 0), ("reference", recipe, 1)):
        build(made, folder / name, seed)
    policy, other = (open_model(str(folder / name), torch.device("cpu")) for name in ("policy", "reference"))
    renderer = Renderer(policy.tokenizer, None)
    rows = [Prompt(prompt=prompt, index=i) for i, prompt in enumerate(LETTERS)]
    drawn = draw(Plain(max_new_tokens=LONGEST).open(policy), renderer, rows, 1000, "bandit")
    subject = Measured(rows, EngineServices(0, torch.device("cpu")), renderer, policy=policy, other=other)
    ratios = [ratio for group in subject.log_ratios(drawn) for ratio in group]
    return drawn, ratios, BanditGap().evaluate(subject)


def error(sample: list[float]) -> float:
    """The standard error of its mean."""
    return stdev(sample) / math.sqrt(len(sample))


def test_what_a_model_is_drawn_to_say_agrees_with_the_sums(measured):
    """The mean reward of the draws lies within four standard errors of the exact one."""
    drawn, _, exact = measured
    rewards = [score.value for group in BanditReward().score(drawn) for score in group]
    assert abs(fmean(rewards) - exact["exact_reward"]) < 4 * error(rewards)


def estimates(ratios: list[float], estimator: str) -> list[float]:
    return kl_estimate(torch.tensor(ratios, dtype=torch.double), estimator).tolist()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimates_of_kl_agree_with_the_sums(measured, estimator):
    """Within four standard errors, which are less than half of what is estimated."""
    _, ratios, exact = measured
    found = estimates(ratios, estimator)
    assert abs(fmean(found) - exact["exact_kl"]) < 4 * error(found) < exact["exact_kl"] / 2


def test_the_biased_estimate_of_kl_does_not(measured):
    _, ratios, exact = measured
    found = estimates(ratios, "k2")
    assert abs(fmean(found) - exact["exact_kl"]) > 4 * error(found)


def test_a_model_of_another_world_is_refused():
    class Other(Uniform):
        def mean_logps(self, rollouts):
            return [[-9.0] * len(group.completions) for group in rollouts]

    with pytest.raises(ConfigError, match="not of the world `bandit`"):
        BanditGap().evaluate(Other())
