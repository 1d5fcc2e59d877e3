"""What a user installs: real wheels, built once, put into environments of their own without network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from prefopt.testing.tiny import tiny_rows, write_rows

ROOT = Path(__file__).parents[1]
SUITE = """\
prefopt: 1
name: outside
seeds: [0]
baseline: sft
stages:
  sft:
    model: {path: "world:replies"}
    data: {source: replies, size: 40}
    algorithm: {name: sft}
    run: {threads: 1, device: cpu}
base:
  model: {path: "stage:sft"}
  data: {source: replies, format: comparisons, size: 20}
  algorithm: {name: outsider}
  run: {threads: 1, device: cpu}
methods: [{label: Outsider}]
tasks: [{name: gold_reward, reward: {name: replies_gold}}, {name: kl}]
sampler: {name: plain, max_new_tokens: 8}
prompts: 4
held_out: {source: replies, format: prompts, size: 4, split: held_out}
workers: 1
"""
LOSS = """\
        gap = batch.sum_tokens(policy.logps - batch.reference_logps) / 10
        chosen, rejected = batch.pairs(gap)
        return Loss(batch.mean((chosen - rejected - self.beta) ** 2, "pairs"), batch.pair_metrics(gap))
"""


def run(*command: str | Path, code: int = 0, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


class Environment:
    """A virtual environment that has prefopt's dependencies, linked, and nothing of prefopt until it is installed."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.bin = folder / "bin"
        site = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if "prefopt" not in path.name and not path.name.endswith(".pth"):
                (site / path.name).symlink_to(path)
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "COV_"))}
        self.variables = {**variables, "OMP_NUM_THREADS": "1", "COLUMNS": "250"}

    def install(self, wheel: Path) -> None:
        self._pip("install", "--no-deps", "--no-index", wheel)

    def remove(self, name: str) -> None:
        self._pip("uninstall", "--yes", name)

    def _pip(self, *arguments: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--python", self.bin / "python", *arguments, "--quiet")

    def __call__(self, *arguments: str | Path, code: int = 0, **options) -> str:
        command, *rest = arguments
        return run(self.bin / command, *rest, code=code, env=self.variables, **options)


def build(source: Path, out: Path) -> Path:
    """The wheel of a distribution."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    folder = Path(tempfile.mkdtemp(dir=out))
    run(*pip, "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("wheels")
    return {"core": build(ROOT, out), "dpo": build(ROOT / "plugins" / "prefopt-dpo", out)}


@pytest.fixture
def config(tmp_path, tiny_model) -> Path:
    data = write_rows(tmp_path / "pairs.jsonl", tiny_rows("comparison"))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"prefopt: 1\nmodel: {{path: {tiny_model}}}\ndata: {{source: jsonl, path: {data}}}\n"
        f"algorithm: {{name: dpo}}\nrun: {{dir: {tmp_path}/run, steps: 2, device: cpu}}\n"
    )
    return path


def test_kernels_come_with_the_wheel(wheels):
    """They are compiled where they are wanted."""
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "prefopt").rglob("*.cpp")}
    assert len(sources) == 2
    assert sources <= set(ZipFile(wheels["core"]).namelist())


def test_dpo_comes_and_goes_with_its_wheel(wheels, tmp_path, config):
    environment = Environment(tmp_path / "env")
    environment.install(wheels["core"])
    refused = environment("prefopt", "validate", config, code=2)
    assert "unknown algorithm `dpo`" in refused
    environment.install(wheels["dpo"])
    assert "valid: dpo (prefopt-dpo 0.1.0)" in environment("prefopt", "validate", config)
    listed = json.loads(environment("prefopt", "plugins", "list", "--json"))
    assert {f["distribution"] for f in listed} == {"prefopt-dpo"}
    (dpo,) = (f for f in listed if f["name"] == "dpo")
    assert str(tmp_path / "env") in dpo["source"]
    environment.remove("prefopt-dpo")
    assert "unknown algorithm `dpo`" in environment("prefopt", "validate", config, code=2)


@pytest.mark.slow
def test_a_plugin_from_outside_has_every_right_without_an_edit_in_the_core(wheels, tmp_path, config):
    """Scaffolded by the installed wheel, then listed, validated, trained, benchmarked, explained, and conforming."""
    environment = Environment(tmp_path / "env")
    environment.install(wheels["core"])
    environment("prefopt", "plugins", "new", "outsider", "--folder", tmp_path)
    source = tmp_path / "prefopt-outsider"
    environment.install(build(source, tmp_path))

    unwritten = environment("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", source, code=1)
    failures = [line for line in unwritten.splitlines() if line.startswith("FAILED")]
    assert len(failures) == 1
    assert failures[0].endswith("Failed: write Outsider.loss in src/prefopt_outsider/method.py")
    assert "Traceback" not in unwritten
    promised = sum(int(number) for number in re.findall(r"(\d+) (?:passed|failed|skipped)", unwritten))
    assert promised > 15

    method = source / "src/prefopt_outsider/method.py"
    text = method.read_text()
    before, after = text[: text.index("        raise NotImplementedError")], ""
    method.write_text(before + LOSS + after)
    assert len([line for line in method.read_text().splitlines() if line.strip()]) <= 40
    environment.remove("prefopt-outsider")
    environment.install(build(source, tmp_path))

    written = environment("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", source)
    assert re.search(r"(\d+) passed", written)[1] == str(promised), (unwritten, written)
    assert "outsider" in environment("prefopt", "plugins", "list")
    assert "setting     beta (default 0.1, above 0)" in environment("prefopt", "explain", "outsider")
    assert "algorithm.outsider" in environment("prefopt", "schema")
    chosen = "algorithm={name: outsider, beta: 0.5}"
    assert "valid: outsider (prefopt-outsider 0.1.0)" in environment("prefopt", "validate", config, chosen)
    assert "finished: " in environment("prefopt", "train", config, chosen)
    (tmp_path / "suite.yaml").write_text(SUITE)
    lines = environment("prefopt", "bench", "run", tmp_path / "suite.yaml", "--out", tmp_path / "out")
    assert "Outsider" in lines
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [s["algorithm"] for s in report["summary"]] == ["outsider"]
    assert report["cells"][0]["versions"]["prefopt-outsider"] == "0.1.0"
