"""Rewards that compare a reply with what its row says is right: 1 for right, 0 for wrong, missing where the row does
not say. Replies are read, never run."""

from __future__ import annotations

import json
import string
import unicodedata
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from prefopt.api import Completion, ConfigError, Rollout, Scorer, Services, UserPath, lazy_import
from prefopt_rewards.numbers import after, boxed, last_number
from prefopt_rewards.scores import Unscorable, Verifier, column

if TYPE_CHECKING:
    import jsonschema
    import referencing
    import regex
else:
    jsonschema = lazy_import("jsonschema")
    referencing = lazy_import("referencing")
    regex = lazy_import("regex")

PUNCTUATION = str.maketrans("", "", string.punctuation)
PATTERN_SECONDS = 1.0


class ExactMatch(Verifier):
    """1 for a reply that is the row's answer, or one of them; white space apart."""

    name = "exact_match"

    column: str = "answer"
    """The column with the answer, or with a list of right answers."""
    after: str = ""
    """The reply's answer is what follows the last of these words in it; without them it is wrong."""
    ignore_case: bool = False
    """Whether capitals make no difference."""
    ignore_punctuation: bool = False
    """Whether ASCII punctuation makes no difference."""

    def value(self, completion: Completion, row: Rollout) -> float:
        right = column(row, self.column)
        answers = right if isinstance(right, list | tuple) else [right]
        said = after(completion.text, self.after) if self.after else completion.text
        return float(said is not None and self._plain(said) in {self._plain(str(answer)) for answer in answers})

    def _plain(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        text = text.casefold() if self.ignore_case else text
        return " ".join((text.translate(PUNCTUATION) if self.ignore_punctuation else text).split())


class NumericAnswer(Verifier):
    """1 for a reply whose number is the row's."""

    name = "numeric_answer"

    column: str = "answer"
    """The column with the number, or with a text that holds it where a reply does."""
    find: Literal["last", "boxed", "after"] = "last"
    """Where a reply's number is: the last one in it, in the last `\\boxed{}`, or the last one after `marker`. A reply
    without it is wrong."""
    marker: str = Field("####", min_length=1)
    """What stands before the number with `find: after`."""
    tolerance: NonNegativeFloat = 1e-6
    """The largest difference that is none: absolute, and for numbers above 1 relative."""

    def value(self, completion: Completion, row: Rollout) -> float:
        right, said = self._right(column(row, self.column)), self._number(completion.text)
        return float(said is not None and abs(said - right) <= self.tolerance * max(1.0, abs(right)))

    def _number(self, text: str) -> float | None:
        place = {"last": text, "boxed": boxed(text), "after": after(text, self.marker)}[self.find]
        return None if place is None else last_number(place)

    def _right(self, written: Any) -> float:
        text = str(written)
        found = self._number(text)
        found = last_number(text) if found is None else found
        if found is None:
            raise Unscorable(f"there is no number in column `{self.column}`: {text[:40]!r}")
        return found


def found(pattern: str, text: str, whole: bool = False) -> bool:
    """Whether a regular expression matches, or with `whole` is all of a text. Raises `Unscorable` for a pattern that is
    none, or that takes longer than a second."""
    try:
        match = regex.fullmatch if whole else regex.search
        return match(pattern, text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise Unscorable(f"the pattern took longer than {PATTERN_SECONDS:g} s on it") from None
    except regex.error as error:
        raise Unscorable(f"the pattern is wrong: {error}") from None


class Regex(Verifier):
    """1 for a reply that a regular expression matches."""

    name = "regex"

    pattern: str = ""
    """The expression, in Python's syntax."""
    column: str = ""
    """The column with the row's own expression, instead of `pattern`."""
    whole: bool = False
    """Whether the whole reply must match, instead of a part of it."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.pattern) == bool(self.column):
            raise ValueError("write either `pattern` or `column`")
        return self

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            found(pattern, "")
        except Unscorable as error:
            raise ValueError(str(error)) from None
        return pattern

    def value(self, completion: Completion, row: Rollout) -> float:
        return float(found(self.pattern or str(column(row, self.column)), completion.text, self.whole))


class JSONSchema(Verifier):
    """1 for a reply that is JSON and fits a JSON schema. References of a schema to others are never fetched."""

    name = "json_schema"

    path: UserPath | None = None
    """The file with the schema."""
    column: str = ""
    """The column with the row's own schema, as JSON text or as data, instead of `path`."""
    block: bool = False
    """Whether the JSON is in the last fenced code block of a reply; a reply without one is wrong."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.path is None) == (not self.column):
            raise ValueError("write either `path` or `column`")
        return self

    def open(self, services: Services) -> Scorer:
        """Raises `ConfigError` when the file holds no schema."""
        if self.path is not None:
            assert self._fixed
        return self.score

    @cached_property
    def _fixed(self) -> Any:
        try:
            with open(str(self.path), encoding="utf-8") as file:
                return validator(file.read())
        except (OSError, ValueError, Unscorable) as error:
            raise ConfigError(str(error), where=f"json_schema: {self.path}", fix="Correct the file.") from None

    def value(self, completion: Completion, row: Rollout) -> float:
        check = self._fixed if self.path is not None else _own(column(row, self.column))
        text = last_block(completion.text) if self.block else completion.text
        try:
            return float(text is not None and check.is_valid(json.loads(text, parse_constant=_no_constant)))
        except ValueError:
            return 0.0
        except RecursionError:
            raise Unscorable("it is nested too deeply to be read") from None
        except referencing.exceptions.Unresolvable as error:
            raise Unscorable(f"the schema refers to another, which is not fetched: {error}") from None


def _own(schema: Any) -> Any:
    return validator(schema if isinstance(schema, str) else json.dumps(schema))


@lru_cache(maxsize=64)
def validator(schema: str) -> Any:
    """The validator of a schema. Raises `Unscorable` when it is none."""
    try:
        data = json.loads(schema)
        base = jsonschema.validators.validator_for(data, default=jsonschema.Draft202012Validator)
        base.check_schema(data)
    except (ValueError, RecursionError) as error:
        raise Unscorable(f"the schema is no JSON: {error}") from None
    except jsonschema.SchemaError as error:
        raise Unscorable(f"the schema is wrong: {error.message}") from None
    timed = jsonschema.validators.extend(base, {"pattern": _pattern})
    return timed(data, registry=referencing.Registry())


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[Any]:
    if isinstance(instance, str) and not found(pattern, instance):
        yield jsonschema.ValidationError(f"it does not match {pattern!r}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def last_block(text: str) -> str | None:
    """The last fenced code block of a text.

    >>> last_block("So:\\n```json\\n{}\\n```\\n")
    '{}\\n'
    """
    parts = ("\n" + text).split("\n```")
    if len(parts) < 3:
        return None
    _, newline, body = parts[(len(parts) - 1) // 2 * 2 - 1].partition("\n")
    return body + newline
