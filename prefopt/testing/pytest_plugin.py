"""Fixtures that pytest offers wherever prefopt is installed.

def test_my_method_trains(train_tiny):
    result = train_tiny(algorithm={"name": "my_method"})
    assert result.outcome == "finished"
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer model of 13,000 weights that reads letters, and its tokenizer."""
    from prefopt.testing.tiny import build_tiny

    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny(folder)
    return folder


@pytest.fixture
def train_tiny(tiny_model: Path, tmp_path: Path) -> Callable[..., Any]:
    """Trains the tiny model; keyword arguments are sections of a run, laid over defaults. Gives the run's `Result`."""
    from prefopt.testing.tiny import train_on

    def train(name: str = "run", **sections: Any) -> Any:
        return train_on(tiny_model, tmp_path / name, sections)

    return train
