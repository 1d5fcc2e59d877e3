"""From a record to a row. The kind of row follows from the fields; a bad field is named, and nothing is guessed.

    prompt, chosen, rejected [, preference, margin, votes]   Comparison
    prompt, completions, ranks | scores                      Ranking
    prompt, completion, label                                Judgement
    prompt, completion                                       Demonstration
    messages                                                 Demonstration (the last assistant turn)
    prompt                                                   Prompt

Values are text, or a list of `{role, content}` messages. Columns not named here are kept in `extra`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from prefopt.data.read import Record, shortened
from prefopt.errors import DataError, Problem
from prefopt.rows import Comparison, Completion, Demonstration, Judgement, Message, Prompt, Ranking, Row, Text

Fields = dict[str, Any]


class BadField(ValueError):
    """A field of a record cannot be used."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(what)
        self.field = field


def to_rows(records: Sequence[Record]) -> list[Row]:
    """The rows of one file. All must be of one kind. Raises `DataError` with every bad row and field."""
    problems: list[Problem] = []
    rows: list[Row] = []
    kind = _kind(records[0].data)
    if kind is None:
        raise DataError(_unrecognised(records[0].data), where=records[0].where, fix=_KNOWN)
    for index, record in enumerate(records):
        try:
            if _kind(record.data) != kind:
                raise BadField("", f"{_unrecognised(record.data)}, unlike the first row, which is a {kind}")
            rows.append(_PARSERS[kind](index, record.data))
        except BadField as error:
            place = f"{record.where}, field `{error.field}`" if error.field else record.where
            problems.append(Problem(str(error), place))
    if problems:
        raise DataError(*shortened(problems))
    return rows


_FORMATS: Final[Mapping[str, frozenset[str]]] = {
    "comparison": frozenset({"prompt", "chosen", "rejected"}),
    "ranking": frozenset({"prompt", "completions"}),
    "judgement": frozenset({"prompt", "completion", "label"}),
    "demonstration": frozenset({"prompt", "completion"}),
    "conversation": frozenset({"messages"}),
    "prompt": frozenset({"prompt"}),
}
_KNOWN: Final = "Known: " + "; ".join(f"{', '.join(sorted(f))} ({k})" for k, f in _FORMATS.items()) + "."


def _kind(data: Fields) -> str | None:
    return next((kind for kind, fields in _FORMATS.items() if fields <= data.keys()), None)


def _unrecognised(data: Fields) -> str:
    return f"fields {', '.join(f'`{k}`' for k in list(data)[:8]) or 'missing'}"


# --- rows -----------------------------------------------------------------------------------------------------------


def _comparison(index: int, data: Fields) -> Row:
    preference = _number(data, "preference", 0.0, 1.0)
    votes = _votes(data)
    if preference is None:
        preference = 1.0 if votes is None else (votes[0] + votes[2] / 2) / sum(votes)
    return Comparison(
        **_common(index, data, "chosen", "rejected", "preference", "margin", "votes"),
        chosen=_completion(data["chosen"], "chosen"),
        rejected=_completion(data["rejected"], "rejected"),
        preference=preference,
        margin=_number(data, "margin"),
        votes=votes,
    ).upright()


def _ranking(index: int, data: Fields) -> Row:
    texts = data["completions"]
    if not isinstance(texts, list) or len(texts) < 2:
        raise BadField("completions", "must be a list of at least two completions")
    completions = tuple(_completion(text, f"completions[{i}]") for i, text in enumerate(texts))
    if "ranks" not in data and "scores" not in data:
        raise BadField("ranks", "is missing: a ranking needs `ranks` (0 the best) or `scores` (more is better)")
    field = "ranks" if "ranks" in data else "scores"
    numbers = _numbers(data[field], field, len(texts))
    order = sorted(set(numbers), reverse=field == "scores")
    ranks = tuple(order.index(number) for number in numbers)
    return Ranking(**_common(index, data, "completions", "ranks", "scores"), completions=completions, ranks=ranks)


def _judgement(index: int, data: Fields) -> Row:
    if not isinstance(data["label"], bool):
        raise BadField("label", f"must be true or false, not {_shown(data['label'])}")
    completion = _completion(data["completion"], "completion")
    return Judgement(**_common(index, data, "completion", "label"), completion=completion, desirable=data["label"])


def _demonstration(index: int, data: Fields) -> Row:
    completion = _completion(data["completion"], "completion")
    return Demonstration(**_common(index, data, "completion"), completion=completion)


def _conversation(index: int, data: Fields) -> Row:
    messages = _messages(data["messages"], "messages")
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise BadField("messages", "must end with an assistant message and hold one before it")
    shared = _common(index, {**data, "prompt": ""}, "messages")
    return Demonstration(**{**shared, "prompt": messages[:-1]}, completion=Completion(messages[-1].content))


def _prompt(index: int, data: Fields) -> Row:
    return Prompt(**_common(index, data))


_PARSERS: Final[Mapping[str, Callable[[int, Fields], Row]]] = {
    "comparison": _comparison,
    "ranking": _ranking,
    "judgement": _judgement,
    "demonstration": _demonstration,
    "conversation": _conversation,
    "prompt": _prompt,
}


# --- fields ---------------------------------------------------------------------------------------------------------


def _common(index: int, data: Fields, *used: str) -> Fields:
    weight = _number(data, "weight", 0.0)
    extra = {k: v for k, v in data.items() if k not in (*used, "prompt", "weight")}
    return {
        "prompt": _text(data["prompt"], "prompt"),
        "index": index,
        "weight": 1.0 if weight is None else weight,
        "extra": extra,
    }


def _text(value: Any, field: str) -> Text:
    if isinstance(value, str):
        return _clean(value, field)
    if isinstance(value, list):
        return _messages(value, field)
    raise BadField(field, f"must be text or a list of messages, not {_shown(value)}")


def _completion(value: Any, field: str) -> Completion:
    if isinstance(value, list):
        messages = _messages(value, field)
        if len(messages) != 1 or messages[0].role != "assistant":
            raise BadField(field, "must be one assistant message; put the conversation before it into `prompt`")
        return Completion(messages[0].content)
    if not isinstance(value, str):
        raise BadField(field, f"must be text, not {_shown(value)}")
    return Completion(_clean(value, field))


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadField(field, "must be a list of messages with at least one")
    out = []
    for i, item in enumerate(value):
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("role"), str)
            or not isinstance(item.get("content"), str)
        ):
            raise BadField(f"{field}[{i}]", "must be an object with text in `role` and `content`")
        out.append(Message(item["role"], _clean(item["content"], f"{field}[{i}]")))
    return tuple(out)


def _clean(value: str, field: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadField(field, f"is not valid Unicode at character {error.start}") from None
    return value


def _number(data: Fields, field: str, low: float = -math.inf, high: float = math.inf) -> float | None:
    value = data.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadField(field, f"must be a finite number, not {_shown(value)}")
    if not low <= value <= high:
        raise BadField(field, f"must be between {low:g} and {high:g}, not {value:g}")
    return float(value)


def _numbers(value: Any, field: str, size: int) -> list[float]:
    if not isinstance(value, list) or len(value) != size:
        raise BadField(field, f"must be a list of {size} numbers, one for each completion")
    numbers = [_number({field: v}, field) for v in value]
    if None in numbers:
        raise BadField(field, "must not hold null")
    return [number for number in numbers if number is not None]


def _votes(data: Fields) -> tuple[int, int, int] | None:
    votes = data.get("votes")
    if votes is None:
        return None
    good = isinstance(votes, list) and len(votes) in (2, 3) and all(type(v) is int and v >= 0 for v in votes)
    if not good or sum(votes) == 0:
        raise BadField("votes", "must count the raters for chosen, rejected and, if any, tie")
    return votes[0], votes[1], votes[2] if len(votes) == 3 else 0


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:60]
