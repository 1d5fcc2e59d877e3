"""What the harness contributes, through the same hooks as every plugin: worlds and measurements."""

from prefopt.api import DataSource, Judge, Reviser, RewardSource, Task, World, hookimpl


@hookimpl
def prefopt_worlds() -> list[type[World]]:
    from prefopt.bench.worlds.bandit import Bandit
    from prefopt.bench.worlds.replies.world import Replies

    return [Bandit, Replies]


@hookimpl
def prefopt_datasets() -> list[type[DataSource]]:
    from prefopt.bench.worlds.bandit import BanditData
    from prefopt.bench.worlds.replies.world import RepliesData

    return [BanditData, RepliesData]


@hookimpl
def prefopt_rewards() -> list[type[RewardSource]]:
    from prefopt.bench.worlds.bandit import BanditReward
    from prefopt.bench.worlds.replies.gold import Gold

    return [BanditReward, Gold]


@hookimpl
def prefopt_judges() -> list[type[Judge]]:
    from prefopt.bench.worlds.replies.annotators import Annotators
    from prefopt.bench.worlds.replies.assistants import PrincipledJudge

    return [Annotators, PrincipledJudge]


@hookimpl
def prefopt_revisers() -> list[type[Reviser]]:
    from prefopt.bench.worlds.replies.assistants import PrincipledAssistant

    return [PrincipledAssistant]


@hookimpl
def prefopt_tasks() -> list[type[Task]]:
    from prefopt.bench.tasks import Divergence, GoldReward, Length, PreferenceAccuracy, RewardQuality, WinRate
    from prefopt.bench.worlds.bandit import BanditGap

    return [GoldReward, WinRate, Divergence, Length, PreferenceAccuracy, RewardQuality, BanditGap]
