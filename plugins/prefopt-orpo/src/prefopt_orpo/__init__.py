"""Preference optimization without a reference model, as a plugin of prefopt."""

from prefopt.api import Algorithm, hookimpl
from prefopt_orpo.pairs import CPO, ORPO, AlphaPO, CPOSimPO, SimPO, SLiCHF
from prefopt_orpo.rankings import PRO, RRHF

METHODS: tuple[type[Algorithm], ...] = (ORPO, CPO, SimPO, CPOSimPO, AlphaPO, SLiCHF, RRHF, PRO)


@hookimpl
def prefopt_algorithms() -> list[type[Algorithm]]:
    return list(METHODS)
