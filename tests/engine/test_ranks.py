from __future__ import annotations

import torch

from prefopt.engine.ranks import Ranks


def test_a_process_alone_has_the_device_of_its_run(monkeypatch):
    """A worker process carries out several runs, one after the other."""
    assert Ranks("cpu").device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Ranks("auto").device.type == "cuda"
    assert not torch.are_deterministic_algorithms_enabled()
    assert Ranks("cpu").device.type == "cpu"
    assert torch.are_deterministic_algorithms_enabled()
