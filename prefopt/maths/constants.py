"""Constants in a gradient. A loss says `stop_gradient(x)` where a paper writes sg(x), never `x.detach()`, so that a
test can tell a constant that is meant from a gradient that was lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_held: ContextVar[Iterator[Tensor] | list[Tensor] | None] = ContextVar("held", default=None)


def stop_gradient(x: Tensor) -> Tensor:
    """`x` as a constant: no gradient flows through it."""
    held = _held.get()
    if held is None:
        return x.detach()
    if isinstance(held, list):
        held.append(x.detach().clone())
        return held[-1]
    return next(held)


@contextmanager
def holding(constants: list[Tensor]) -> Iterator[None]:
    """Within it every `stop_gradient` gives, in the order of calls, what it gave when `constants` was filled; an empty
    list is filled. Then a difference quotient sees the same constants as the gradient does."""
    token = _held.set(iter(list(constants)) if constants else constants)
    try:
        yield
    finally:
        _held.reset(token)
