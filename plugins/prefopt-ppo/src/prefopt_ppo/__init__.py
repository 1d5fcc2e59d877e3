"""Proximal policy optimization, as a plugin of prefopt."""

from prefopt.api import Algorithm, hookimpl
from prefopt_ppo.ppo import PPO

METHODS: tuple[type[Algorithm], ...] = (PPO,)


@hookimpl
def prefopt_algorithms() -> list[type[Algorithm]]:
    return list(METHODS)
