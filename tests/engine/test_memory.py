from __future__ import annotations

import os

import pytest
import torch

from prefopt.engine.memory import peak_bytes, reset_peak

CPU = torch.device("cpu")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot reset a peak")
def test_a_peak_forgets_what_came_before_it():
    reset_peak(CPU)
    before = peak_bytes(CPU)
    torch.zeros(2**24)
    assert peak_bytes(CPU) - before > 60 * 2**20
    reset_peak(CPU)
    assert peak_bytes(CPU) - before < 8 * 2**20
