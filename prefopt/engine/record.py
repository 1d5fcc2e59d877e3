"""Lines of a run: metrics that can be compared byte for byte, timings that cannot, samples. Only the main rank
writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from prefopt.errors import redact

COMPARED: Final = ("metrics.jsonl", "samples.jsonl")
TIMINGS: Final = "timings.jsonl"


class Recorder:
    """Appends to the files of a run folder, and cuts them back to where a checkpoint was."""

    def __init__(self, folder: Path, active: bool) -> None:
        self.folder, self.active = folder, active

    def line(self, name: str, record: Mapping[str, Any]) -> None:
        """One more line in `name`."""
        if self.active:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(redact(dict(record)), ensure_ascii=False) + "\n")

    def sizes(self) -> dict[str, int]:
        """Bytes in each compared file."""
        paths = [self.folder / name for name in COMPARED]
        return {path.name: path.stat().st_size for path in paths if path.exists()}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the metrics, of training and of evaluation."""
        path = self.folder / COMPARED[0]
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def last(self) -> dict[str, Any]:
        """The last line of the metrics, of training and of evaluation together."""
        return {name: value for line in self.metrics()[-2:] for name, value in line.items()}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Drops what was written after a checkpoint with these `sizes`."""
        if self.active:
            for name in COMPARED:
                path = self.folder / name
                if path.exists():
                    with path.open("r+b") as file:
                        file.truncate(sizes.get(name, 0))


def numbers(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Metrics as JSON: what is not finite is spelled out, since JSON has no number for it."""
    return {name: x if abs(x) < float("inf") else str(x) for name, x in sorted(metrics.items())}
