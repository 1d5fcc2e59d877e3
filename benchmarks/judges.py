"""Measures judges on real data: rules as floors, and what real judges were recorded to say. Writes their figures to
`benchmarks/results/judges.json`; no text of the data is in it.

    python benchmarks/judges.py [FOLDER]

FOLDER is where `prefopt judge evaluate` writes its reports. The data is found where `PREFOPT_DATA` says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prefopt.bench.judging.evaluate import JudgeReport, evaluate
from prefopt.cli.judge import read
from prefopt.engine.folder import write_text

HERE = Path(__file__).parent
RESULT = HERE / "results/judges.json"


def main(folder: str = "runs/judges") -> None:
    found = {}
    for path in sorted((HERE / "judges").glob("*.yaml")):
        print(path.name)
        config = read(path, [f"out={folder}/{path.stem}"])
        found[path.stem] = figures(evaluate(config, lambda line: None), path)
    write_text(RESULT, json.dumps(found, indent=1) + "\n")


def figures(report: JudgeReport, path: Path) -> dict[str, object]:
    """What is published of a report."""
    judges = {
        judge.label: {
            "metrics": {name: x.model_dump(exclude_none=True) for name, x in judge.metrics.items()},
            "usage": judge.usage,
            "missing": sum(judge.missing.values()),
        }
        for judge in report.judges
    }
    command = f"prefopt judge evaluate benchmarks/judges/{path.name}"
    return {
        "command": command,
        "commit": report.commit,
        "pairs": report.pairs,
        "left_out": report.left_out,
        "judges": judges,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
