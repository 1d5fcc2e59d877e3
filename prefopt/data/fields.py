"""Single fields of a record, checked: text, conversations, numbers, votes. Knows nothing about formats.

A field that cannot be used raises `BadField`, which names it; nothing is converted or guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from prefopt.data.read import BadRow, Cell, Fields
from prefopt.rows import Completion, Message, Text

ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
SPEAKERS: Final[Mapping[str, str]] = {"system": "system", "human": "user", "gpt": "assistant"}
"""What sharegpt calls the roles."""


class BadField(BadRow):
    """A field of a record cannot be used."""

    def __init__(self, sort: str, field: str, what: str, fix: str = "") -> None:
        super().__init__(sort, what, where=f"field `{field}`", fix=fix)


def shown(value: Any) -> str:
    """A value in an error: its type and how it begins."""
    return f"{type(value).__name__} {str(value)[:40]!r}" if isinstance(value, str) else _other(value)


def _other(value: Any) -> str:
    try:
        return f"{type(value).__name__} {value!r}"[:60]
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return type(value).__name__


# --- text -------------------------------------------------------------------------------------------------------------


def clean(value: str, field: str) -> str:
    """Text that a tokenizer can read."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadField("not Unicode", field, f"is not valid Unicode at character {error.start}") from None
    if "\0" in value:
        raise BadField("not text", field, f"holds a NUL character at character {value.index(chr(0))}")
    return str(value)


def plain(value: Any, field: str) -> str:
    """Text, and not a conversation."""
    if not isinstance(value, str):
        raise BadField("not text", field, f"must be text, not {shown(value)}")
    return clean(value, field)


def text(value: Any, field: str) -> Text:
    """A prompt: text, or a conversation that is to be answered."""
    if isinstance(value, str):
        return clean(value, field)
    if not isinstance(value, list):
        raise BadField("not text", field, f"must be text or a list of messages, not {shown(value)}")
    return asked(messages(value, field), field)


def asked(found: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    """A conversation that waits for an answer."""
    if found[-1].role == "assistant":
        raise BadField("messages", field, "must not end with an assistant message: that is what is to be written")
    return found


def completion(value: Any, field: str, prompt: Text | None = None) -> Completion:
    """A reply: text, or a list with one assistant message."""
    if not isinstance(value, list):
        return Completion(plain(value, field))
    found = messages(value, field)
    if len(found) != 1 or found[0].role != "assistant":
        what = "must be one assistant message; put the conversation before it into `prompt`"
        raise BadField("messages", field, what)
    if isinstance(prompt, str):
        raise BadField("mixed", field, "is a list of messages, but the prompt is text")
    return Completion(found[0].content)


# --- conversations ----------------------------------------------------------------------------------------------------


def messages(value: Any, field: str) -> tuple[Message, ...]:
    """A list of `{role, content}`; content is text, or a list of parts of text."""
    if not isinstance(value, list) or not value:
        raise BadField("messages", field, "must be a list of messages with at least one")
    return tuple(_message(item, f"{field}[{i}]") for i, item in enumerate(value))


def _message(item: Any, field: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or item.get("content") is None:
        raise BadField("messages", field, "must be an object with text in `role` and `content`")
    role = item["role"]
    if role not in ROLES:
        raise BadField("messages", field, f"has the unknown role {role[:40]!r}; known: {', '.join(sorted(ROLES))}")
    if item.get("tool_calls") or item.get("function_call"):
        raise BadField("messages", field, "has tool calls, which prefopt does not train on")
    if item.get("loss_weight") not in (None, float(role == "assistant")):
        what = f"has loss_weight {shown(item['loss_weight'])}; assistant turns are trained with weight 1, others with 0"
        raise BadField("messages", field, what, "Remove it, or give the row a `weight`.")
    return Message(role, _content(item["content"], field))


def _content(value: Any, field: str) -> str:
    if isinstance(value, list) and value:
        return "".join(_part(part, field) for part in value)
    if not isinstance(value, str):
        raise BadField("messages", field, "must be an object with text in `role` and `content`")
    return clean(value, field)


def _part(part: Any, field: str) -> str:
    """`{type: text, text: ...}`; LLaMA-Factory writes `value` for the second."""
    found = part.get("text", part.get("value")) if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(found, str):
        raise BadField("messages", field, "has content that is not text")
    return clean(found, field)


def spoken(value: Any, field: str, data: Fields) -> tuple[Message, ...]:
    """A sharegpt conversation, a list of `{from, value}`, behind the row's `system` if it has one."""
    if not isinstance(value, list) or not value:
        raise BadField("messages", field, "must be a list of turns with at least one")
    turns = tuple(turn(item, f"{field}[{i}]") for i, item in enumerate(value))
    return (*system(data), *turns)


def turn(item: Any, field: str) -> Message:
    """One `{from, value}`."""
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("from", "value")):
        raise BadField("messages", field, "must be an object with text in `from` and `value`")
    if item["from"] not in SPEAKERS:
        raise BadField("messages", field, f"is from {item['from'][:40]!r}; known: {', '.join(SPEAKERS)}")
    return Message(SPEAKERS[item["from"]], clean(item["value"], field))


def system(data: Fields) -> tuple[Message, ...]:
    """The row's own system prompt, when it is not empty."""
    value = data.get("system")
    return (Message("system", plain(value, "system")),) if value else ()


def answered(found: tuple[Message, ...], field: str) -> tuple[tuple[Message, ...], Completion]:
    """A finished conversation as what was asked and the last answer."""
    if len(found) < 2 or found[-1].role != "assistant":
        raise BadField("messages", field, "must end with an assistant message and hold one before it")
    return asked(found[:-1], field), Completion(found[-1].content)


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(data: Fields, field: str, low: float = -math.inf, high: float = math.inf) -> float | None:
    """A finite number between bounds; None when the field is absent or null."""
    value = data.get(field)
    if value is None or (isinstance(value, Cell) and (value := _of_cell(value)) is None):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise BadField("not a number", field, f"must be a finite number, not {shown(value)}")
    if not low <= value <= high:
        raise BadField("not a number", field, f"must be between {low:g} and {high:g}, not {float(value):g}")
    return float(value)


def _of_cell(cell: Cell) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return str(cell)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def numbers(value: Any, field: str, size: int) -> list[float]:
    """A list of `size` numbers."""
    if not isinstance(value, list) or len(value) != size:
        raise BadField("not a number", field, f"must be a list of {size} numbers, one for each completion")
    found = [number({field: v}, field) for v in value]
    if None in found:
        raise BadField("not a number", field, "must not hold null")
    return [n for n in found if n is not None]


def places(scores: Sequence[float], best_first: bool) -> tuple[int, ...]:
    """Scores as places, 0 the best; equal scores share a place.

    >>> places([0.5, 2, 0.5], best_first=False), places([3, 1, 2], best_first=True)
    ((1, 0, 1), (2, 0, 1))
    """
    order = sorted(set(scores), reverse=not best_first)
    return tuple(order.index(score) for score in scores)


def votes(data: Fields) -> tuple[int, int, int] | None:
    """How many raters were for chosen, rejected and tie."""
    found = data.get("votes")
    if found is None:
        return None
    good = isinstance(found, list) and len(found) in (2, 3) and all(type(v) is int and v >= 0 for v in found)
    if not good or sum(found) == 0:
        raise BadField("votes", "votes", "must count the raters for chosen, rejected and, if any, tie")
    return found[0], found[1], found[2] if len(found) == 3 else 0


def truth(value: Any, field: str) -> bool:
    """True or false, and nothing that could stand for them."""
    if isinstance(value, Cell) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        fix = "Say what its values mean: data.labels: {desirable: ..., undesirable: ...}."
        raise BadField("label", field, f"must be true or false, not {shown(value)}", fix)
    return value


def one_of(value: Any, known: Iterable[str], field: str) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in known:
        fix = f"Say what its values mean: data.labels: {{{', '.join(f'{k}: ...' for k in known)}}}."
        raise BadField("label", field, f"must be one of {', '.join(known)}, not {shown(value)}", fix)
    return value
