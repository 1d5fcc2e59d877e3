"""For plugin authors' tests: `test_conformance = conformance(MyMethod)` checks every promise the engine relies on.

`check_algorithm(cls)` does the same outside pytest; `pinned(path, MyMethod)` keeps its numbers from changing unseen.
Installing prefopt also gives pytest the fixtures `tiny_model` and `train_tiny` (see `prefopt.testing.pytest_plugin`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.testing.failure import ConformanceFailure
    from prefopt.testing.kit import check_algorithm, conformance
    from prefopt.testing.pins import pinned

_FROM = {"ConformanceFailure": "failure", "check_algorithm": "kit", "conformance": "kit", "pinned": "pins"}

__all__ = ["ConformanceFailure", "check_algorithm", "conformance", "pinned"]


def __getattr__(name: str) -> Any:
    """Loads the kit when it is first used: pytest imports this package in every environment that has prefopt."""
    if name not in __all__:
        raise AttributeError(name)
    return getattr(import_module(f"prefopt.testing.{_FROM[name]}"), name)
