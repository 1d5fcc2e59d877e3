"""Reward sources, as a plugin of prefopt."""

from prefopt.api import RewardSource, hookimpl


@hookimpl
def prefopt_rewards() -> list[type[RewardSource]]:
    from prefopt_rewards.combine import Ensemble, Weighted
    from prefopt_rewards.function import FunctionReward
    from prefopt_rewards.lexicon import Lexicon
    from prefopt_rewards.service import HTTPReward
    from prefopt_rewards.shape import Length, Repetition
    from prefopt_rewards.verifiers import ExactMatch, JSONSchema, NumericAnswer, Regex

    verifiers = (ExactMatch, NumericAnswer, Regex, JSONSchema, Length, Repetition, Lexicon)
    return [Weighted, Ensemble, *verifiers, FunctionReward, HTTPReward]
