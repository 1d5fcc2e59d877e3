"""What the harness contributes, through the same hooks as every plugin: worlds and measurements."""

from prefopt.api import DataSource, Judge, Reviser, RewardSource, Task, World, hookimpl
from prefopt.bench.tasks import Divergence, GoldReward, Length, PreferenceAccuracy, RewardQuality, WinRate
from prefopt.bench.worlds.bandit import Bandit, BanditData, BanditGap, BanditReward
from prefopt.bench.worlds.replies.annotators import Annotators
from prefopt.bench.worlds.replies.assistants import PrincipledAssistant, PrincipledJudge
from prefopt.bench.worlds.replies.gold import Gold
from prefopt.bench.worlds.replies.world import Replies, RepliesData


@hookimpl
def prefopt_worlds() -> list[type[World]]:
    return [Bandit, Replies]


@hookimpl
def prefopt_datasets() -> list[type[DataSource]]:
    return [BanditData, RepliesData]


@hookimpl
def prefopt_rewards() -> list[type[RewardSource]]:
    return [BanditReward, Gold]


@hookimpl
def prefopt_judges() -> list[type[Judge]]:
    return [Annotators, PrincipledJudge]


@hookimpl
def prefopt_revisers() -> list[type[Reviser]]:
    return [PrincipledAssistant]


@hookimpl
def prefopt_tasks() -> list[type[Task]]:
    return [GoldReward, WinRate, Divergence, Length, PreferenceAccuracy, RewardQuality, BanditGap]
