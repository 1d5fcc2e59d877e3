"""How many seeds a comparison needs: in how many of the ways to choose k of a report's seeds each method's interval is
above the baseline's. Writes `benchmarks/results/seeds.json`.

    prefopt bench run benchmarks/suites/quickstart.yaml "seeds=[0,1,2,3,4,5,6,7,8,9]" --out runs/seeds
    python benchmarks/seeds.py runs/seeds/report.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb
from pathlib import Path

from prefopt.bench.report import Report, name_of
from prefopt.engine.folder import write_text
from prefopt.stats import Interval, t_interval

RESULT = Path(__file__).parent / "results/seeds.json"
BASELINE, METRIC, CHOSEN = "SFT", "gold_reward", (3, 4, 5)
Values = Mapping[str, Sequence[float]]
"""What each method reached, one number for each seed."""


def main(path: str) -> None:
    report = Report.model_validate_json(Path(path).read_text("utf-8"))
    found = values(report)
    told = {
        "commit": report.commit,
        "seeds": report.seeds,
        METRIC: found,
        "smallest_gain": {name: smallest_gain(found, name) for name in found},
        "above": {k: above(found, k) for k in CHOSEN},
    }
    write_text(RESULT, json.dumps(told, indent=1) + "\n")
    for k in CHOSEN:
        print(f"{k} of {len(report.seeds)} seeds, {comb(len(report.seeds), k):,} choices: {above(found, k)}")
    print(f"smallest gain over {BASELINE} of the same seed: {told['smallest_gain']}")


def values(report: Report) -> dict[str, list[float]]:
    """The metric of every method, by seed."""
    by_name: dict[str, dict[int, float]] = {}
    for cell in report.cells:
        by_name.setdefault(name_of(cell), {})[cell.seed] = cell.metrics[METRIC]
    return {name: [own[seed] for seed in report.seeds] for name, own in by_name.items()}


def smallest_gain(found: Values, name: str) -> float:
    return min(x - y for x, y in zip(found[name], found[BASELINE], strict=True))


def above(found: Values, k: int) -> dict[str, int]:
    """In how many choices of k seeds the interval lies above the baseline's whole interval; `all`: every method's."""
    others = [name for name in found if name != BASELINE]
    counts = dict.fromkeys([*others, "all"], 0)
    for choice in combinations(range(len(found[BASELINE])), k):
        limit = _interval(found[BASELINE], choice).high
        clear = [name for name in others if _interval(found[name], choice).low > limit]
        for name in [*clear, *["all"] * (clear == others)]:
            counts[name] += 1
    return counts


def _interval(numbers: Sequence[float], choice: Sequence[int]) -> Interval:
    return t_interval([numbers[i] for i in choice])


if __name__ == "__main__":
    main(*sys.argv[1:])
