"""How the conformance kit says no."""

from __future__ import annotations


class ConformanceFailure(AssertionError):
    """An algorithm broke a promise; the message says which, and what to do."""


def require(condition: bool, message: str) -> None:
    """Raises `ConformanceFailure` unless the condition holds."""
    if not condition:
        raise ConformanceFailure(message)
