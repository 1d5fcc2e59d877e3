"""The core's own worlds, through the same hooks as every plugin."""

from prefopt.api import hookimpl
from prefopt.bench.worlds.replies.annotators import Annotators
from prefopt.bench.worlds.replies.gold import Gold
from prefopt.bench.worlds.replies.world import Replies, RepliesData


@hookimpl
def prefopt_worlds():
    return [Replies]


@hookimpl
def prefopt_datasets():
    return [RepliesData]


@hookimpl
def prefopt_rewards():
    return [Gold]


@hookimpl
def prefopt_judges():
    return [Annotators]
