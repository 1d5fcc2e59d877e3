"""Learning from samples without a critic, as a plugin of prefopt."""

from prefopt.api import Algorithm, hookimpl
from prefopt_online.groups import BNPO, DAPO, GRPO, RLOO, DrGRPO
from prefopt_online.preferences import RAFT, REBEL, XPO, AStarPO, IterativeDPO, NashMD, OnlineDPO
from prefopt_online.ratios import CISPO, GMPO, GSPO, SAPO
from prefopt_online.reinforce import Reinforce, ReinforcePlusPlus, ReinforcePlusPlusBaseline, ReMax

METHODS: tuple[type[Algorithm], ...] = (
    *(RLOO, GRPO, DrGRPO, DAPO, BNPO),
    *(GSPO, GMPO, CISPO, SAPO),
    *(Reinforce, ReinforcePlusPlus, ReinforcePlusPlusBaseline, ReMax),
    *(RAFT, OnlineDPO, IterativeDPO, NashMD, XPO, REBEL, AStarPO),
)


@hookimpl
def prefopt_algorithms() -> list[type[Algorithm]]:
    return list(METHODS)
