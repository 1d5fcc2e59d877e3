"""Plots as coordinates; the template draws them as SVG, so that every label is escaped like all other text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from prefopt.stats import Interval

WIDTH, ROW, LEFT, RIGHT = 640, 30, 190, 24
HEIGHT, BOTTOM, TOP, NAMES = 340, 44, 30, 210
APART = 16
"""Pixels between two names at least."""


@dataclass(frozen=True)
class Point:
    """A method: its value, and where it is plotted against another."""

    label: str
    y: Interval
    x: Interval | None = None


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Axis:
        low, high = min(values), max(values)
        pad = (high - low) * 0.08 or max(abs(high), 1.0) * 0.1
        return cls(low - pad, high + pad, start, end)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Pixels and texts of at most `most` round numbers."""
        raw = (self.high - self.low) / most
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
        first = math.ceil(self.low / step)
        count = math.floor(self.high / step) - first + 1
        return [(self((first + i) * step), f"{(first + i) * step:g}") for i in range(count)]


def _ends(interval: Interval) -> tuple[float, float]:
    low = interval.mean if interval.low is None else interval.low
    high = interval.mean if interval.high is None else interval.high
    return low, high


def forest(points: Sequence[Point]) -> dict[str, object]:
    """One line for each method: a dot at the mean, a bar over the interval."""
    if not points:
        return {"rows": [], "ticks": [], "width": WIDTH, "height": 0}
    axis = Axis.over([end for p in points for end in _ends(p.y)], LEFT, WIDTH - RIGHT)
    rows = [
        {
            "label": p.label,
            "y": TOP + ROW * i,
            "low": axis(_ends(p.y)[0]),
            "high": axis(_ends(p.y)[1]),
            "mean": axis(p.y.mean),
        }
        for i, p in enumerate(points)
    ]
    return {"rows": rows, "ticks": axis.ticks(), "width": WIDTH, "height": TOP + ROW * len(points) + 24, "left": LEFT}


def scatter(points: Sequence[Point]) -> dict[str, object]:
    """Each method at (x, y) with a cross over both intervals; the names stand in a column beside, in order of y."""
    pairs = [(p, p.x) for p in points if p.x is not None]
    if not pairs:
        return {"points": [], "x_ticks": [], "y_ticks": [], "width": WIDTH, "height": 0}
    left, right, bottom = 56, WIDTH, max(HEIGHT - BOTTOM, TOP + APART * len(pairs))
    x_axis = Axis.over([end for _, x in pairs for end in _ends(x)], left, right)
    y_axis = Axis.over([end for p, _ in pairs for end in _ends(p.y)], bottom, TOP)
    names = apart([y_axis(p.y.mean) for p, _ in pairs], bottom)
    marks = [
        {
            "label": p.label,
            "name": name,
            "x": x_axis(x.mean),
            "y": y_axis(p.y.mean),
            "left": x_axis(_ends(x)[0]),
            "right": x_axis(_ends(x)[1]),
            "bottom": y_axis(_ends(p.y)[0]),
            "top": y_axis(_ends(p.y)[1]),
        }
        for (p, x), name in zip(pairs, names, strict=True)
    ]
    frame = {
        "width": WIDTH + NAMES,
        "height": bottom + BOTTOM,
        "left": left,
        "right": right,
        "bottom": bottom,
        "top": TOP,
    }
    return {"points": marks, "x_ticks": x_axis.ticks(), "y_ticks": y_axis.ticks(), **frame}


def apart(wanted: Sequence[float], last: float) -> list[float]:
    """Places near the wanted ones and in their order, `APART` from each other, none behind `last`.

    >>> apart([20, 21, 90, 10], last=90)
    [26, 42, 90, 10]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = list(wanted)
    for before, i in pairwise(order):
        places[i] = max(places[i], places[before] + APART)
    for i in reversed(order):
        places[i] = min(places[i], last)
        last = places[i] - APART
    return places
