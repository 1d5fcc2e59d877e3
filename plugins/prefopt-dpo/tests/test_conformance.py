"""Every method keeps its promises, and so do those whose settings take another path."""

from __future__ import annotations

from pathlib import Path

from prefopt_dpo import DPO, METHODS
from prefopt_dpo.mixtures import MPO, RPO
from prefopt_dpo.shapes import FDPO, IPO
from prefopt_dpo.transport import AOT

from prefopt.testing import conformance, pinned

test_conformance = conformance(*METHODS)
OTHERS = (
    DPO(label_smoothing=0.2),
    IPO(length="sum"),
    FDPO(divergence="forward_kl"),
    FDPO(divergence="alpha", alpha=0.3),
    AOT(label_smoothing=0.1),
    RPO(nll="tokens"),
    MPO(losses={"exo_pair": 1.0, "apo_down": 0.5}),
)
test_conformance_of_other_settings = conformance(*OTHERS)
test_numbers_stay = pinned(Path(__file__).with_name("pins.json"), *METHODS, *OTHERS)
