"""Every method keeps its promises, and so do those whose settings take another path."""

from __future__ import annotations

from pathlib import Path

from prefopt_kto import METHODS
from prefopt_kto.methods import KTO

from prefopt.testing import conformance, pinned

test_conformance = conformance(*METHODS)
OTHERS = (
    KTO(kl_rows=2),
    KTO(desirable_weight=1.3, undesirable_weight=0.7),
)
test_conformance_of_other_settings = conformance(*OTHERS)
test_numbers_stay = pinned(Path(__file__).with_name("pins.json"), *METHODS, *OTHERS)
