"""DPO through the engine against losses recorded from TRL 1.16 (see record_trl.py): eight updates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefopt.data.streams import Order
from prefopt.testing.tiny import train_on, write_rows

FOLDER = Path(__file__).parent / "trl_dpo"


@pytest.mark.parametrize("budget", [8192, 64], ids=["one microbatch", "many microbatches"])
@pytest.mark.parametrize("mode", ["cached", "resident"])
def test_dpo_follows_trl_step_by_step(tmp_path, budget, mode):
    record = json.loads((FOLDER / "losses.json").read_text("utf-8"))
    settings, rows = record["settings"], record["rows"]
    order = Order(range(len(rows)), settings["batch"], seed=0)
    placed: list[dict[str, str]] = [{}] * len(rows)
    for step in range(settings["steps"]):
        for offset, place in enumerate(order.step(step)):
            placed[place] = rows[step * settings["batch"] + offset]
    data = write_rows(tmp_path / "pairs.jsonl", placed)
    sections = {
        "data": {"source": "jsonl", "path": str(data)},
        "algorithm": {"name": "dpo", "beta": settings["beta"]},
        "optim": {
            "lr": settings["lr"],
            "batch_size": settings["batch"],
            "schedule": settings["schedule"],
            "warmup": 0.0,
            "max_grad_norm": settings["clip"],
            "token_budget": budget,
        },
        "reference": {"mode": mode},
        "run": {"steps": settings["steps"]},
    }
    result = train_on(FOLDER / "model", tmp_path / "run", sections)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["loss/total"] for line in lines] == pytest.approx(record["losses"], abs=1e-5)
