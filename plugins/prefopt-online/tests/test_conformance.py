"""Every method keeps its promises, and so do those whose settings take another path."""

from __future__ import annotations

from pathlib import Path

from prefopt_online import METHODS
from prefopt_online.groups import DAPO, GRPO, RLOO
from prefopt_online.preferences import REBEL, NashMD
from prefopt_online.ratios import CISPO, GMPO, GSPO, SAPO
from prefopt_online.reinforce import ReinforcePlusPlus

from prefopt.testing import conformance, pinned

test_conformance = conformance(*METHODS)
OTHERS = (
    GRPO(inner_epochs=2),
    GRPO(scale="none", kl_in="reward", minibatches=2),
    RLOO(kl_in="loss", inner_epochs=2),
    DAPO(overlong=60, cushion=59, inner_epochs=2),
    GSPO(inner_epochs=2),
    GMPO(inner_epochs=2),
    CISPO(inner_epochs=2, importance_cap=2.0),
    SAPO(inner_epochs=2),
    ReinforcePlusPlus(kl_in="loss", inner_epochs=2),
    NashMD(beta=0.0),
    REBEL(inner_epochs=2),
)
test_conformance_of_other_settings = conformance(*OTHERS)
test_numbers_stay = pinned(Path(__file__).with_name("pins.json"), *METHODS, *OTHERS)
