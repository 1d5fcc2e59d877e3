"""`prefopt judge`: reads a configuration, prints what the work says. Argument parsing only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from prefopt.bench.judging.compare import compare
from prefopt.bench.judging.evaluate import evaluate
from prefopt.bench.judging.label import label
from prefopt.bench.judging.page import write
from prefopt.config import allowed_in, read_document
from prefopt.config.judging import JudgingConfig
from prefopt.config.load import validated
from prefopt.plugins import load

Say = Callable[[str], None]


def read(path: Path, overrides: Sequence[str]) -> JudgingConfig:
    """The configuration in a file, with overrides laid over it."""
    document = read_document(path, overrides)
    return validated(JudgingConfig, document, load(allowed_in(document), whole=False).find)


def write_labels(path: Path, overrides: Sequence[str], say: Say) -> list[str]:
    """Labels the rows; says where they are."""
    result = label(read(path, overrides), say)
    missing = [f"  without a verdict, {n:,} times: {why}" for why, n in result.missing.items()]
    usage = result.usage
    fooled = (
        [f"  canaries: {usage['fooled']:.0f} of {usage['canaries']:.0f} fooled the judge"]
        if "canaries" in usage
        else []
    )
    return [*missing, *fooled, f"{result.labelled:,} rows in {result.path}"]


def write_evaluation(path: Path, overrides: Sequence[str], say: Say) -> list[str]:
    """Measures judges; gives the tables."""
    config = read(path, overrides)
    return write(evaluate(config, say), Path(config.out))


def write_comparison(path: Path, overrides: Sequence[str], say: Say) -> list[str]:
    """Compares systems; gives the tables."""
    config = read(path, overrides)
    return write(compare(config, say), Path(config.out))
