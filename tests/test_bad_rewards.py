"""Runs whose reward function misbehaves for two rows of eight: they lose what it could not score and nothing else."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from prefopt.engine.collect import Collector
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
GRACE = 2.0
"""Seconds beyond the deadline within which a call has ended, whatever the function does."""
ROWS = range(8)


def run(model: Path, folder: Path, method: str, name: str, policy: str):
    folder.mkdir(exist_ok=True)
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


@pytest.fixture
def asked(monkeypatch):
    """How long each call for scores took, in seconds."""
    taken = []
    ask = Collector._asked

    def timed(self, groups):
        began = time.monotonic()
        try:
            return ask(self, groups)
        finally:
            taken.append(time.monotonic() - began)

    monkeypatch.setattr(Collector, "_asked", timed)
    return taken


def table_of(result) -> list[dict]:
    return pyarrow.parquet.read_table(result.folder / "rollouts.parquet").to_pylist()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_what_a_bad_reward_could_not_score_is_left_out_and_no_score_is_invented(
    tiny_model, tmp_path, method, name, asked, capsys
):
    """In time, with the reason in the table, and a warning that names step and row."""
    result = run(tiny_model, tmp_path, method, name, "drop_group")
    assert result.outcome == "finished"
    table = table_of(result)
    used, unused = ([row for row in table if row["used"] == wanted] for wanted in (True, False))
    assert {row["row"] for row in used} <= set(ROWS) - {2, 5}
    assert {2, 5} <= {row["row"] for row in unused}
    assert all(row["score"] == len(row["completion"]) / 4 and row["reason"] is None for row in used)
    lacking = [row for row in unused if row["score"] is None]
    assert all(f"function bad_rewards.py:{name}, row {row['row']}, sample " in row["reason"] for row in lacking)
    (line,) = (json.loads(text) for text in (result.folder / "metrics.jsonl").read_text().splitlines())
    assert line["reward/missing"] == len(lacking) >= 2
    first = lacking[0]["row"]
    assert re.search(rf"step 1, row {first}: reply \d of \d+ could not be scored: ", capsys.readouterr().out)
    assert max(asked) < DEADLINE + GRACE


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_reward_that_changes_what_it_is_given_changes_copies(tiny_model, tmp_path, method, capsys):
    result = run(tiny_model, tmp_path, method, "mutates", "abort")
    table = table_of(result)
    assert {row["row"] for row in table} == set(ROWS)
    assert all(row["used"] and row["score"] == len(row["completion"]) / 4 for row in table)
    assert "could not be scored" not in capsys.readouterr().out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_run_that_is_to_end_ends_soon_and_says_why(tiny_model, tmp_path, name, asked):
    said = rf"step 1, row \d: reply \d of .*function bad_rewards.py:{name}, row \d, sample \d+: "
    with pytest.raises(ServiceError, match=said):
        run(tiny_model, tmp_path, "ppo" if FUNCTIONS.index(name) % 2 else "grpo", name, "abort")
    assert max(asked) < DEADLINE + GRACE


@pytest.mark.parametrize("name", ["raises", "is_not_a_number", "segfaults"])
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_reply_that_could_not_be_scored_is_left_out_alone_or_asked_for_again(
    tiny_model, tmp_path, method, name, asked
):
    table = table_of(run(tiny_model, tmp_path, method, name, "drop_sample"))
    assert all(row["used"] == (row["score"] is not None) for row in table)
    assert {row["row"] for row in table if not row["used"]} == {2, 5}
    asked.clear()
    with pytest.raises(ServiceError, match=r"row 2: reply 1 of \d+ could not be scored 4 times: "):
        run(tiny_model, tmp_path / "again", method, name, "retry")
    assert len(asked) == 4
