"""Modules that load on first use, so that listing and validating plugins never pays for torch.

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_import("torch")
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LazyModule:
    """Stands for a module and imports it when an attribute is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


def lazy_import(name: str) -> Any:
    """A stand-in for module `name`; raises `ImportError` on first use, not here, when the module is missing."""
    return LazyModule(name)
