"""Sums and ensembles against numbers by hand; a missing part is a missing whole."""

from __future__ import annotations

from math import nan

import pytest
from prefopt_rewards.combine import Ensemble, Part, Weighted

from prefopt.api import Completion, ConfigError, PluginError, RewardSource, Rollout, Score
from prefopt.config import run_from
from prefopt.config.yaml import parse
from prefopt.plugins import load

GROUPS = [
    Rollout(prompt="p", index=3, completions=(Completion("a"), Completion("bb"))),
    Rollout(prompt="q", index=4, completions=(Completion("ccc"),)),
]


class Fixed(RewardSource):
    """`values` for the completions of two groups."""

    name = "fixed"

    values: tuple[float | None, float | None, float | None]

    def score(self, groups):
        first, second, third = (Score(v, "" if v is not None else "no idea", {"own": 1.0}) for v in self.values)
        return [[first, second], [third]]


class Short(RewardSource):
    """One score for all."""

    name = "short"

    def score(self, groups):
        return [[Score(1.0)]]


def fixed(*values):
    return Fixed.model_construct(values=values)


def values(scores):
    return [[score.value for score in own] for own in scores]


def test_a_weighted_sum_clips_weighs_and_names_its_parts():
    parts = (
        Part(source=fixed(1.0, -2.0, 3.0), weight=2.0, label="main"),
        Part(source=fixed(10.0, 0.5, -10.0), weight=-1.0, clip=(-1.0, 1.0)),
    )
    found = Weighted(parts=parts).open(None)(GROUPS)
    assert values(found) == [[2.0 - 1.0, -4.0 - 0.5], [6.0 + 1.0]]
    assert found[0][0].parts == {"main": 2.0, "fixed": -1.0, "main/own": 1.0, "fixed/own": 1.0}


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "fixed is missing: no idea"), (nan, "fixed is missing: its score is nan")]
)
def test_a_missing_part_is_a_missing_sum(value, reason):
    parts = (Part(source=fixed(1.0, 1.0, 1.0), label="main"), Part(source=fixed(1.0, value, 1.0)))
    found = Weighted(parts=parts).open(None)(GROUPS)
    assert values(found) == [[2.0, None], [2.0]]
    assert found[0][1].reason.startswith(f"weighted, row 3, sample 1: {reason}")


def test_a_sum_that_overflows_is_missing():
    parts = (Part(source=fixed(1e308, 1.0, 1.0), weight=10.0),)
    found = Weighted(parts=parts).open(None)(GROUPS)
    assert values(found) == [[None, 10.0], [10.0]]


MEMBERS = (fixed(1.0, 2.0, 0.0), fixed(3.0, 2.0, 0.0), fixed(8.0, 2.0, -3.0))


@pytest.mark.parametrize(
    ("aggregate", "wanted"),
    [
        ("mean", [[4.0, 2.0], [-1.0]]),
        ("min", [[1.0, 2.0], [-3.0]]),
        ("uncertainty", [[4.0 - 0.5 * 26 / 3, 2.0], [-1.0 - 0.5 * 2.0]]),
    ],
)
def test_an_ensemble_aggregates_as_coste_et_al_do(aggregate, wanted):
    found = Ensemble(members=MEMBERS, aggregate=aggregate, penalty=0.5).open(None)(GROUPS)
    assert values(found) == [pytest.approx(own) for own in wanted]
    spreads = [score.parts["disagreement"] for own in found for score in own]
    assert spreads == pytest.approx([(26 / 3) ** 0.5, 0.0, 2**0.5])


def test_a_missing_member_is_a_missing_ensemble():
    found = Ensemble(members=(MEMBERS[0], fixed(1.0, None, 1.0))).open(None)(GROUPS)
    assert values(found) == [[1.0, None], [0.5]]
    assert "ensemble, row 3, sample 1: member 1 (fixed) is missing: no idea" in found[0][1].reason


def test_a_source_that_gives_one_score_for_several_completions_breaks_its_promise():
    with pytest.raises(PluginError, match="reward short did not give one score for each completion"):
        Weighted(parts=(Part(source=Short()),)).open(None)(GROUPS)


RUN = """
prefopt: 1
model: {path: x}
data: {source: replies}
algorithm: {name: sft}
run: {dir: x}
eval:
  every: 1
  tasks:
    - name: gold_reward
      reward:
        name: weighted
        parts:
          - {source: {name: replies_gold}}
          - {source: {name: length, maximum: 64}, weight: 0.5, clip: [0.5, 1], label: %s}
"""


def test_parts_are_named_in_a_configuration_and_survive_a_file():
    plugins = load()
    config = run_from(parse(RUN % "short", "run.yaml"), plugins.find)
    reward = config.eval.tasks[0].reward
    assert [part.source.name for part in reward.parts] == ["replies_gold", "length"]
    assert reward.parts[1].clip == (0.5, 1.0)
    again = Weighted.model_validate_json(reward.model_dump_json(), context={"find": plugins.find})
    assert again == reward


def test_two_parts_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two parts have one name"):
        run_from(parse(RUN % "replies_gold", "run.yaml"), load().find)


def test_a_part_cannot_take_the_name_of_another_metric():
    with pytest.raises(ConfigError, match="`mean` is the name of another metric"):
        run_from(parse(RUN % "mean", "run.yaml"), load().find)
