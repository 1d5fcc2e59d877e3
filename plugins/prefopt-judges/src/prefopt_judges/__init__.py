"""Judges of replies, as a plugin of prefopt."""

from prefopt.api import Judge, hookimpl


@hookimpl
def prefopt_judges() -> list[type[Judge]]:
    from prefopt_judges.local import Local
    from prefopt_judges.openai import OpenAI
    from prefopt_judges.panel import Ensemble, Majority
    from prefopt_judges.replay import Replay
    from prefopt_judges.rules import Rule

    return [Local, OpenAI, Rule, Ensemble, Majority, Replay]
