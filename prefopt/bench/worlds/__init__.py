"""The core's own worlds, through the same hooks as every plugin."""

from prefopt.api import DataSource, Judge, RewardSource, World, hookimpl
from prefopt.bench.worlds.replies.annotators import Annotators
from prefopt.bench.worlds.replies.gold import Gold
from prefopt.bench.worlds.replies.world import Replies, RepliesData


@hookimpl
def prefopt_worlds() -> list[type[World]]:
    return [Replies]


@hookimpl
def prefopt_datasets() -> list[type[DataSource]]:
    return [RepliesData]


@hookimpl
def prefopt_rewards() -> list[type[RewardSource]]:
    return [Gold]


@hookimpl
def prefopt_judges() -> list[type[Judge]]:
    return [Annotators]
