"""Direct Preference Optimization and what was made of it, as a plugin of prefopt."""

from prefopt.api import Algorithm, hookimpl
from prefopt_dpo.dpo import DPO, ConservativeDPO, RobustDPO
from prefopt_dpo.margins import DPOPositive, LengthNormalisedDPO, LengthRegularisedDPO, OffsetDPO
from prefopt_dpo.mixtures import MPO, RPO
from prefopt_dpo.shapes import FDPO, IPO, DiscoPOP, EXOPair, Hinge
from prefopt_dpo.sides import APODown, APOZero, BCOPair, NCAPair, SPPOHard
from prefopt_dpo.tokens import LDDPO, TDPO1, TDPO2, SamPO
from prefopt_dpo.transport import AOT, AOTUnpaired
from prefopt_dpo.weighted import WPO, BetaDPO

METHODS: tuple[type[Algorithm], ...] = (
    *(DPO, ConservativeDPO, RobustDPO, IPO, Hinge, EXOPair, DiscoPOP, FDPO),
    *(NCAPair, BCOPair, SPPOHard, APOZero, APODown, AOT, AOTUnpaired),
    *(LengthNormalisedDPO, LengthRegularisedDPO, OffsetDPO, DPOPositive, LDDPO, SamPO, TDPO1, TDPO2),
    *(WPO, BetaDPO, RPO, MPO),
)


@hookimpl
def prefopt_algorithms() -> list[type[Algorithm]]:
    return list(METHODS)
