"""What the core itself contributes, through the same hooks as every plugin."""

from prefopt.api import Algorithm, DataSource, Judge, Reviser, RewardSource, Sampler, hookimpl
from prefopt.builtin.algorithms import DynamicFineTuning, RewardModel, RewardModelListwise, SupervisedFineTuning


@hookimpl
def prefopt_algorithms() -> list[type[Algorithm]]:
    return [SupervisedFineTuning, DynamicFineTuning, RewardModel, RewardModelListwise]


@hookimpl
def prefopt_rewards() -> list[type[RewardSource]]:
    from prefopt.builtin.rewards import JudgeReward, TrainedReward

    return [TrainedReward, JudgeReward]


@hookimpl
def prefopt_judges() -> list[type[Judge]]:
    from prefopt.builtin.judges import GoldJudge, RewardModelJudge

    return [GoldJudge, RewardModelJudge]


@hookimpl
def prefopt_revisers() -> list[type[Reviser]]:
    from prefopt.builtin.revisers import ModelReviser

    return [ModelReviser]


@hookimpl
def prefopt_datasets() -> list[type[DataSource]]:
    from prefopt.builtin.sources import SOURCES

    return list(SOURCES)


@hookimpl
def prefopt_samplers() -> list[type[Sampler]]:
    from prefopt.builtin.continuous import Continuous
    from prefopt.builtin.samplers import Plain

    return [Plain, Continuous]
