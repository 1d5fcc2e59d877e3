"""Errors a user can act on. Every problem says what is wrong, where, and what to do.

This module knows nothing about the rest of prefopt. Anything that is not a `PrefoptError` is a bug and keeps its
traceback.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `what`, `where` (file:line:column, row and field, ...) and how to `fix` it."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}" + (f"\n    {self.fix}" if self.fix else "")


class PrefoptError(Exception):
    """Carries every problem found, not only the first. `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1
    title: ClassVar[str] = "error"

    def __init__(self, *problems: Problem | str, where: str = "", fix: str = "") -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p, where, fix) for p in problems)
        super().__init__("\n".join(map(str, self.problems)))


class ConfigError(PrefoptError):
    """The configuration or the command line is wrong."""

    exit_code = 2
    title = "configuration"


class DataError(PrefoptError):
    """A data set cannot be read, or does not hold what the algorithm needs."""

    exit_code = 3
    title = "data"


class PluginError(PrefoptError):
    """A plugin that the configuration names cannot be loaded, or broke its promise."""

    exit_code = 4
    title = "plugin"


class MissingColumn(PluginError):
    """An algorithm read a column or a live output that its `needs()` did not declare."""


class ResourceError(PrefoptError):
    """Something outside the configuration ran out or broke: disk, memory, a lock, numbers that are no longer finite."""

    exit_code = 5
    title = "resource"


class ServiceError(PrefoptError):
    """A judge or another network service failed."""

    exit_code = 6
    title = "judge or network"


class Preempted(PrefoptError):
    """The run was asked to stop; it saved its state and can be resumed."""

    exit_code = 75
    title = "stopped"


EXIT_CODES: Final[Mapping[int, str]] = {
    0: "success",
    1: "a bug in prefopt: please report the traceback",
    2: "the configuration or the command line is wrong",
    3: "a data set is wrong",
    4: "a plugin is missing, broken or broke its promise",
    5: "a resource failed: disk, memory, lock, non-finite numbers",
    6: "a judge or a network service failed",
    75: "stopped on request; `prefopt resume` continues",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known name, or lists all of them.

    >>> did_you_mean("dop", ["dpo", "sft"])
    'Did you mean `dpo`?'
    >>> did_you_mean("zzz", ["dpo", "sft"])
    'Known: dpo, sft.'
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"Known: {', '.join(names)}." if names else "None is known here."


_SECRET_KEY: Final = re.compile(
    r"(?:.*[_.-])?(?:(?:hf|auth|access|refresh|bearer|api|id|secret)_?token|api_?key|(?:access|private|secret)_?key"
    r"|secret|pass(?:word|wd|phrase)|credentials?)|token",
    re.IGNORECASE,
)
"""Keys that name a secret, as a whole or by their last words: `stop_token` and `token_budget` do not."""
_SECRET_VARIABLE: Final = re.compile(r"token(?!iz)|secret|passw|api_?key|credential|private_?key", re.IGNORECASE)
_NAMES_A_FILE: Final = re.compile(r"_(file|path|dir)$", re.IGNORECASE)
_SECRET_TEXT: Final = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,})\b")
REDACTED: Final = "[redacted]"


def _secret_values() -> list[str]:
    named = (v for k, v in os.environ.items() if _SECRET_VARIABLE.search(k) and not _NAMES_A_FILE.search(k))
    return [value for value in named if len(value) >= 8]


def redact(value: Any) -> Any:
    """`value` (text, or anything JSON can hold) without secrets: known patterns, values of secret environment
    variables, and text under keys that name a secret. Everything written to a run folder or a report passes through
    here; nothing that is run does.

    >>> redact({"api_key": "abc", "max_new_tokens": 3, "note": "hf_abcdefghijklmnopqrst"})
    {'api_key': '[redacted]', 'max_new_tokens': 3, 'note': '[redacted]'}
    >>> redact({"api_key": "env:MY_KEY"})
    {'api_key': 'env:MY_KEY'}
    """
    if isinstance(value, str):
        for secret in _secret_values():
            value = value.replace(secret, REDACTED)
        return _SECRET_TEXT.sub(REDACTED, value)
    if isinstance(value, Mapping):
        return {redact(k): REDACTED if _is_secret(k, v) else redact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redact, value))
    return value


def _is_secret(key: Any, value: Any) -> bool:
    named = isinstance(key, str) and _SECRET_KEY.fullmatch(key) is not None
    return named and isinstance(value, str) and not value.startswith("env:")
