"""Learning from replies called good or bad, as a plugin of prefopt."""

from prefopt.api import Algorithm, hookimpl
from prefopt_kto.methods import BCO, KTO, APOZeroUnpaired

METHODS: tuple[type[Algorithm], ...] = (KTO, BCO, APOZeroUnpaired)


@hookimpl
def prefopt_algorithms() -> list[type[Algorithm]]:
    return list(METHODS)
