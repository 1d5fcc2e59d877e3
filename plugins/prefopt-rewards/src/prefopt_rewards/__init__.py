"""Reward sources, as a plugin of prefopt."""

from prefopt.api import RewardSource, hookimpl
from prefopt_rewards.combine import Ensemble, Weighted
from prefopt_rewards.function import FunctionReward
from prefopt_rewards.lexicon import Lexicon
from prefopt_rewards.service import HTTPReward
from prefopt_rewards.shape import Length, Repetition
from prefopt_rewards.verifiers import ExactMatch, JSONSchema, NumericAnswer, Regex

REWARDS: tuple[type[RewardSource], ...] = (
    Weighted,
    Ensemble,
    ExactMatch,
    NumericAnswer,
    Regex,
    JSONSchema,
    Length,
    Repetition,
    Lexicon,
    FunctionReward,
    HTTPReward,
)


@hookimpl
def prefopt_rewards() -> list[type[RewardSource]]:
    return list(REWARDS)
