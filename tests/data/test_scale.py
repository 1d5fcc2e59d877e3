"""A million rows: checked, and the first batch rendered, in seconds and without holding them in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

ROWS = 1_000_000
SCRIPT = """
import json, resource, sys, time
began = time.perf_counter()
from prefopt.data.render import load_tokenizer
from prefopt.engine.inputs import Inputs
from prefopt.engine.services import EngineServices
from prefopt.config import load_run
from prefopt.plugins import load
from pathlib import Path
config = load_run(Path(sys.argv[1]), load().find)
inputs = Inputs.of(config, load_tokenizer(config.model.path), 128, EngineServices(0))
built = inputs.assembler(inputs.order.step(0))
print(json.dumps({
    "rows": len(inputs.assembler.rows),
    "sequences": len(built.batch),
    "steps": inputs.total,
    "wall_seconds": time.perf_counter() - began,
    "processor_seconds": time.process_time(),
    "peak_kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_million_rows_are_checked_and_a_batch_rendered_in_a_minute_and_a_gigabyte(tmp_path, tiny_model, packed):
    import gzip

    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    with gzip.open(path, "wb", compresslevel=1) if packed else path.open("wb") as file:
        for i in range(ROWS):
            row = {"prompt": f"count from {i}: " + "x" * 60, "chosen": "1 2 3 " * 20, "rejected": f"{i} " * 10}
            file.write(json.dumps(row).encode() + b"\n")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"prefopt: 1\nmodel: {{path: {tiny_model}}}\ndata: {{source: jsonl, path: {path}, overflow: truncate}}\n"
        f"algorithm: {{name: dpo}}\noptim: {{batch_size: 32}}\nrun: {{dir: {tmp_path}/run}}\n"
    )
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"{path.stat().st_size / 1e6:.0f} MB: {found}")
    assert (found["rows"], found["sequences"], found["steps"]) == (ROWS, 64, ROWS // 32)
    assert found["wall_seconds"] <= 60
    assert found["peak_kilobytes"] < 1_000_000
