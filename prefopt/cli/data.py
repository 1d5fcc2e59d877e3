"""`prefopt data check`: what the rows of a file or of a configuration were taken for, and every row that cannot be
used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from pathlib import Path

from prefopt.builtin.sources import BY_SUFFIX
from prefopt.data.check import Reject, Report, examine, write_rejects
from prefopt.data.read import MAX_PROBLEMS
from prefopt.data.source import verdict
from prefopt.errors import ConfigError, DataError
from prefopt.rows import Row

Say = Callable[[str], None]
CONFIGS = (".yaml", ".yml")


def suffix(path: Path) -> str:
    """The kind of a file; what it is packed with does not count."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def file_rows(path: Path) -> List[Row]:
    """The rows of a file, by its suffix."""
    kind = suffix(path)
    if not path.is_file():
        raise DataError("there is no such file", where=str(path))
    if kind not in BY_SUFFIX:
        known = ", ".join(BY_SUFFIX)
        fix = f'Write its rows as JSONL, such as {{"text": ...}} on each line. Known: {known}, also with .gz; .yaml.'
        raise DataError(f"`{kind or path.name}` files have no rows that prefopt can read", where=str(path), fix=fix)
    source = BY_SUFFIX[kind].model_validate({"path": str(path)})
    return source.rows()


def check_rows(name: str, rows: List[Row], say: Say) -> list[Reject]:
    """Looks at every row and says what was found."""
    report = examine(rows)
    say(f"{name}: {verdict(rows)}")
    for remark, count in sorted(report.remarks.items()):
        say(f"  {remark}: {count:,}")
    say(f"  usable: {len(report.good):,} of {report.total:,}")
    for line in _bad(report):
        say(line)
    return report.rejects


def _bad(report: Report) -> Iterator[str]:
    for sort, rejects in report.by_sort().items():
        yield f"  {sort}: {len(rejects):,}"
        for reject in rejects[:MAX_PROBLEMS]:
            yield f"    {reject.problem}".replace("\n    ", "\n        ")
        if len(rejects) > MAX_PROBLEMS:
            yield f"    and {len(rejects) - MAX_PROBLEMS:,} more: --rejects FILE writes all of them"


def finish(rejects: list[Reject], out: Path | None) -> bool:
    """Writes the bad rows where they are wanted; True when there are none."""
    if out is not None:
        if out.exists():
            raise ConfigError("the file exists already", where=str(out), fix="Name a new one.")
        write_rejects(out, rejects)
    return not rejects
