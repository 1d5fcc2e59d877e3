"""Every method keeps its promises, and so do those whose settings take another path."""

from __future__ import annotations

from pathlib import Path

from prefopt_orpo import METHODS
from prefopt_orpo.pairs import CPO, ORPO, AlphaPO
from prefopt_orpo.rankings import PRO

from prefopt.testing import conformance, pinned

test_conformance = conformance(*METHODS)
OTHERS = (
    ORPO(nll="sequence"),
    CPO(alpha=0.0),
    CPO(label_smoothing=0.2),
    AlphaPO(alpha=-0.5),
    PRO(temperature="scores"),
)
test_conformance_of_other_settings = conformance(*OTHERS)
test_numbers_stay = pinned(Path(__file__).with_name("pins.json"), *METHODS, *OTHERS)
