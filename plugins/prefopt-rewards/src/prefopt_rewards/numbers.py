"""Numbers in replies: where the answer stands, and what it is. Text in, numbers out."""

from __future__ import annotations

import math
import re
from collections import deque

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-+\u2212])?\$?(?<![\w.])(?P<above>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<power>[-+]?\d{1,4}))?(?:\s?/\s?(?P<below>\d+(?:\.\d+)?))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}")
_SPACING = re.compile(r"\\[,!;: ]")


def last_number(text: str) -> float | None:
    r"""The last number in a text; None when it has none, or none that is finite.

    >>> [last_number(t) for t in ("1,234.5 apples", "so x = -3/4.", r"\frac{1}{2}", "10-3", "no 5s, v1.2", "none")]
    [1234.5, -0.75, 0.5, 3.0, 5.0, None]
    """
    plain = _SPACING.sub("", _FRACTION.sub(r"\1/\2", text)).replace("{,}", ",")
    found = deque(_NUMBER.finditer(plain), maxlen=1)
    return _value(found[0]) if found else None


def _value(found: re.Match[str]) -> float | None:
    value = float(found["above"].replace(",", "")) * (-1 if found["sign"] not in (None, "+") else 1)
    below = float(found["below"] or 1)
    try:
        value *= 10.0 ** int(found["power"] or 0)
    except OverflowError:
        return None
    return value / below if below and math.isfinite(value) and math.isfinite(below) else None


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of a text.

    >>> boxed(r"\boxed{1} or rather \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 7 : i]
    return None


def after(text: str, marker: str) -> str | None:
    """What follows the last `marker` in a text.

    >>> after("3 + 4 = 7 #### 7", "####")
    ' 7'
    """
    _, found, rest = text.rpartition(marker)
    return rest if found else None
