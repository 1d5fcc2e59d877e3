from __future__ import annotations

import os
import resource

import pytest
import torch

from prefopt.engine.memory import keep_freed, peak_bytes, reset_peak

CPU = torch.device("cpu")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot reset a peak")
def test_a_peak_forgets_what_came_before_it():
    reset_peak(CPU)
    before = peak_bytes(CPU)
    torch.zeros(2**24)
    assert peak_bytes(CPU) - before > 60 * 2**20
    reset_peak(CPU)
    assert peak_bytes(CPU) - before < 8 * 2**20


@pytest.mark.skipif(not keep_freed(), reason="this C library keeps nothing")
def test_what_is_freed_costs_no_page_faults_when_it_is_asked_for_again():
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in (2**24, 2**22, 2**23):
            torch.ones(size)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    found = [faults() for _ in range(8)]
    assert found[-1] < 2**24 * 4 / resource.getpagesize() / 100
