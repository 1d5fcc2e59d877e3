"""Runs whose reward function misbehaves for two rows of eight: they lose what it could not score and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from prefopt.errors import ServiceError
from prefopt.testing.tiny import train_on, write_rows

BAD = Path(__file__).parents[1] / "plugins/prefopt-rewards/tests/bad_rewards.py"
FUNCTIONS = (
    *(
        "raises",
        "hangs",
        "hangs_in_c",
        "is_not_a_number",
        "is_infinite",
        "is_too_short",
        "is_one_value",
        "is_text",
        "is_nothing",
    ),
    *("is_huge", "segfaults", "exits", "allocates", "recurses", "prints_without_end", "leaves_a_child"),
)
DEADLINE = 1.0
ROWS = range(8)


def run(model: Path, folder: Path, method: str, name: str, policy: str):
    rows = [{"prompt": f"count from {i}: ", "bad": i in (2, 5)} for i in ROWS]
    return train_on(
        model,
        folder / "run",
        {
            "data": {"source": "jsonl", "path": str(write_rows(folder / "rows.jsonl", rows))},
            "algorithm": {"name": method},
            "reward": {"name": "function", "function": f"{BAD}:{name}", "deadline": DEADLINE, "memory_mb": 512},
            "rollout": {"on_missing": policy},
            "sampler": {"name": "plain", "max_new_tokens": 4},
            "optim": {"batch_size": len(ROWS)},
            "run": {"steps": 1},
        },
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_what_a_bad_reward_could_not_score_is_left_out_and_no_score_is_invented(tiny_model, tmp_path, method, name):
    result = run(tiny_model, tmp_path, method, name, "drop_group")
    assert result.outcome == "finished"
    table = pyarrow.parquet.read_table(result.folder / "rollouts.parquet").to_pylist()
    assert {row["row"] for row in table} <= set(ROWS) - {2, 5}
    assert all(row["score"] == len(row["completion"]) / 4 for row in table)
    (line,) = (json.loads(text) for text in (result.folder / "metrics.jsonl").read_text().splitlines())
    assert line["reward/missing"] >= 2


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_run_that_is_to_end_ends_soon_and_says_why(tiny_model, tmp_path, method):
    began = time.monotonic()
    with pytest.raises(ServiceError, match=r"row \d: reply 1 of .*function bad_rewards.py:hangs, row \d, sample 0: "):
        run(tiny_model, tmp_path, method, "hangs", "abort")
    print(f"{method}: {time.monotonic() - began:.1f} s, the deadline is {DEADLINE} s")
