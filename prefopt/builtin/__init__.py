"""What the core itself contributes, through the same hooks as every plugin."""

from prefopt.api import Algorithm, DataSource, Judge, Reviser, RewardSource, Sampler, hookimpl
from prefopt.builtin.algorithms import DynamicFineTuning, RewardModel, RewardModelListwise, SupervisedFineTuning
from prefopt.builtin.continuous import Continuous
from prefopt.builtin.judges import GoldJudge, RewardModelJudge
from prefopt.builtin.revisers import ModelReviser
from prefopt.builtin.rewards import JudgeReward, TrainedReward
from prefopt.builtin.samplers import Plain
from prefopt.builtin.sources import SOURCES


@hookimpl
def prefopt_algorithms() -> list[type[Algorithm]]:
    return [SupervisedFineTuning, DynamicFineTuning, RewardModel, RewardModelListwise]


@hookimpl
def prefopt_rewards() -> list[type[RewardSource]]:
    return [TrainedReward, JudgeReward]


@hookimpl
def prefopt_judges() -> list[type[Judge]]:
    return [GoldJudge, RewardModelJudge]


@hookimpl
def prefopt_revisers() -> list[type[Reviser]]:
    return [ModelReviser]


@hookimpl
def prefopt_datasets() -> list[type[DataSource]]:
    return list(SOURCES)


@hookimpl
def prefopt_samplers() -> list[type[Sampler]]:
    return [Plain, Continuous]
