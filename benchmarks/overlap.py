"""What `rollout.overlap` gains where a reward is waited for: replies of a step drawn and scored, with and without it.

    python benchmarks/overlap.py WORKLOAD OUT.json [--prompts 64] [--samples 8] [--turns 3]

WORKLOAD is made by `compare/workload.py`. The reward is a service on this machine, a process of its own, that answers
each request after SECONDS; `http` asks four at a time. Lengths are uneven, as in `rollout.py`. Every way makes the same
step in turn, in one process, after a turn that is not counted; what they draw and its scores must be equal. `at once`
scores when everything is drawn; `no wait` does so with a service that answers immediately, and is all that can be had.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from rollout import LONGEST, MEAN, lean_to_the_end, read_prompts

from prefopt import session
from prefopt.bench.report import short_commit
from prefopt.config import load_run
from prefopt.engine.collect import Collector
from prefopt.engine.folder import RunFolder, write_text
from prefopt.engine.journal import Collected, Journal
from prefopt.engine.ranks import Ranks
from prefopt.plugins import load

SECONDS = 0.5
WAYS = {"no wait": None, "at once": None, "overlap 8": 8, "overlap 4": 4}
CONFIG = """
prefopt: 1
model: {{path: {workload}/model}}
data: {{source: jsonl, path: {workload}/prompts.jsonl}}
algorithm: {{name: grpo, n: {samples}}}
sampler: {{name: continuous, max_new_tokens: {LONGEST}}}
reward: {{name: http, url: "{url}"}}
optim: {{batch_size: {prompts}}}
run: {{dir: {folder}/run, steps: 1, device: cpu, threads: 2}}
"""


class Service(BaseHTTPRequestHandler):
    """Scores completions by their letters e. The path says after how many seconds."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(float(self.path.strip("/")))
        body = json.dumps({"scores": [text.count("e") for text in asked["completions"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve(ready: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    ready.send(server.server_port)
    server.serve_forever()


@contextmanager
def service() -> Iterator[str]:
    """Its address."""
    ours, theirs = Pipe()
    process = get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()


def collector(url: str, options: argparse.Namespace, folder: Path) -> Collector:
    """Of a run with this reward."""
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    fields = {**vars(options), "url": url, "folder": folder, "LONGEST": LONGEST}
    (folder / "run.yaml").write_text(CONFIG.format(**fields), "utf-8")
    config = load_run(folder / "run.yaml", plugins.find)
    run = session.Session(config, plugins, Ranks("cpu", 2), RunFolder(Path(config.run.dir)), print)
    run.folder.create()
    loop, _ = run.assemble()
    assert loop.collector is not None
    lean_to_the_end(loop.scorer.network, read_prompts(options.workload, options.prompts, 1), MEAN)
    return loop.collector


def timed(made: Collector, overlap: int | None) -> tuple[float, Collected]:
    with tempfile.TemporaryDirectory() as folder:
        settings = made.settings.model_copy(update={"overlap": overlap})
        began = time.perf_counter()
        found = replace(made, settings=settings, journal=Journal(Path(folder), True))(0)
        return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in {"prompts": 64, "samples": 8, "turns": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with service() as address, tempfile.TemporaryDirectory() as folder:
        waits = {wait: Path(folder) / wait for wait in ("0", str(SECONDS))}
        for path in waits.values():
            path.mkdir()
        made = {wait: collector(f"{address}/{wait}", options, path) for wait, path in waits.items()}
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(options.turns + 1):
            expected = None
            for way, overlap in list(WAYS.items())[:: -1 if turn % 2 else 1]:
                seconds, found = timed(made["0" if way == "no wait" else str(SECONDS)], overlap)
                assert expected in (None, found.rollouts), f"{way} draws or scores otherwise"
                expected = found.rollouts
                taken[way] += [seconds] if turn else []
                print(f"{way}: {seconds:.1f} s, {found.sampled} tokens", flush=True)
    report = {"commit": short_commit(), "torch": torch.__version__, "wait_seconds": SECONDS, "tokens": found.sampled}
    report |= {"prompts": options.prompts, "samples": options.samples}
    for way, seconds in taken.items():
        print(f"{way:12}{median(seconds):6.1f} s, of {', '.join(f'{s:.1f}' for s in seconds)}")
    write_text(options.out, json.dumps({**report, "seconds": taken}, indent=1) + "\n")


if __name__ == "__main__":
    main()
