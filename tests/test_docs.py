"""What the documentation says is run: commands, configurations, code, links."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.bench.plan import make_plan
from prefopt.components import Algorithm
from prefopt.config import Stage, run_from, stages_of
from prefopt.config.judging import JudgingConfig
from prefopt.config.load import validated
from prefopt.config.making import Constitution
from prefopt.config.models import SuiteConfig
from prefopt.config.yaml import parse
from prefopt.data.render import Renderer, load_tokenizer
from prefopt.engine.models import open_model
from prefopt.engine.rollout import draw
from prefopt.pipeline import checked, run_stages
from prefopt.rows import Prompt
from prefopt.testing import check_algorithm
from prefopt.testing.tiny import tiny_rows, write_rows

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
PAGES += sorted((ROOT / "plugins").glob("*/README.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text("utf-8")) if found == kind]


def identity(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_blocks(kind: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, kind)]


def with_commands() -> list[Any]:
    """Pages whose commands are run; what trains several models is slow."""
    pages = [page for page in with_blocks("console") if page.name != "README.md"]
    slow = {"tutorial.md", "rlaif.md"}
    return [pytest.param(page, marks=[pytest.mark.slow] * (page.name in slow), id=identity(page)) for page in pages]


@pytest.mark.parametrize("page", with_commands())
def test_commands_run_as_written(page, tmp_path):
    """All commands of a page, in order, in one shell; then its Python, where the commands have led."""
    commands = [line[2:] for text in blocks(page, "console") for line in text.splitlines() if line.startswith("$ ")]
    assert commands
    bin_folder = Path(sys.executable).parent
    unobserved = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}
    environment = {**unobserved, "PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    after = [] if page.name != "tutorial.md" else [f"python -c '{blocks(page, 'python')[0]}'"]
    script = "\n".join(["set -e", *commands, *after])
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if after:
        assert "Shop:" in done.stdout.splitlines()[-1]


def test_commands_of_the_readme_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    commands = [line for text in blocks(ROOT / "README.md", "console") for line in text.splitlines()]
    assert commands == ["$ make quickstart", "$ make test"]
    for command in commands:
        assert re.search(rf"^{command.split()[-1]}:", makefile, re.MULTILINE)
    assert "exec make test" in (ROOT / ".ci" / "run").read_text("utf-8")


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=identity)
def test_configurations_are_valid(page, plugins, tmp_path):
    for text in blocks(page, "yaml"):
        document = parse(text, identity(page))
        if "methods" in document.data:
            suite = validated(SuiteConfig, document, plugins.find)
            assert make_plan(suite, document, tmp_path, plugins.find).cells
        elif "stages" in document.data:
            assert stages_of(document, plugins.find)
        elif "principles" in document.data:
            assert validated(Constitution, document, plugins.find)
        elif {"judge", "judges"} & document.data.keys():
            validated(JudgingConfig, document, plugins.find)
        elif "prefopt" in document.data:
            run_from(document, plugins.find)
        else:  # a part of a run
            whole = "prefopt: 1\nmodel: {path: x}\ndata: {source: replies}\nalgorithm: {name: sft}\nrun: {dir: x}\n"
            run_from(parse(whole, "whole").merged(document), plugins.find)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def self_play(tiny_model, plugins, tmp_path) -> list[Stage]:
    """The stages of self-play as they are written, with a tiny model, its rows and two steps in each, all run."""
    (text,) = (text for text in blocks(ROOT / "docs/how-to/rlaif.md", "yaml") if "self_play" in text)
    document = parse(text, "rlaif.md")
    source = {"source": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", tiny_rows("demonstration")))}
    settings = {"dir": str(tmp_path), "seed": 0, "steps": 2, "device": "cpu", "threads": 1}
    document.data |= {"data": source, "run": settings, "optim": {"lr": 0.01, "batch_size": 8}}
    document.data["sampler"]["max_new_tokens"] = 6
    document.data["stages"][0] |= {"model": {"path": str(tiny_model)}, "run": {}}
    stages = checked(document, plugins)
    finished = [line.partition(": finished: ")[0] for line in run_stages(stages, plugins) if ": finished: " in line]
    assert finished == [stage.name for stage in stages]
    return stages


def replies_of(stage: Stage) -> list[str]:
    """What the model of a stage replies to the tiny prompts, drawn without the stage."""
    path, sampler = stage.config.model.path, stage.config.sampler
    model = open_model(path, torch.device("cpu"))
    prompts = [Prompt(prompt=row["prompt"], index=i) for i, row in enumerate(tiny_rows("demonstration"))]
    groups = draw(sampler.open(model), Renderer(load_tokenizer(path), model.positions), prompts, 1, 0, "stage")
    return [group.completions[0].text for group in groups]


def test_each_round_of_self_play_is_dpo_against_the_model_that_drew(self_play, tmp_path):
    """Its loss begins at log 2, that of a policy which is its reference, and both rounds learn from replies of their
    own."""
    sft, *rounds = self_play
    assert [stage.name for stage in rounds] == ["draws-1", "round-1", "draws-2", "round-2"]
    worse = []
    for draws, trained, before in ((*rounds[:2], sft), (*rounds[2:], rounds[1])):
        assert draws.config.model.path == trained.config.model.path == before.product
        rows = read(tmp_path / draws.name / "rows.jsonl")
        assert [row["chosen"] for row in rows] == [row["completion"] for row in tiny_rows("demonstration")]
        worse.append([row["rejected"] for row in rows])
        assert worse[-1] == replies_of(draws)
        first, last = (line["loss/total"] for line in read(tmp_path / trained.name / "metrics.jsonl"))
        assert first == pytest.approx(math.log(2), abs=1e-6)
        assert last < first - 1e-3
    assert worse[0] != worse[1]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/suites").glob("*.yaml")), ids=identity)
def test_suites_are_valid(path, plugins, tmp_path):
    document = parse(path.read_text("utf-8"), path.name)
    suite = validated(SuiteConfig, document, plugins.find)
    assert suite.name == path.stem
    assert make_plan(suite, document, tmp_path, plugins.find).cells


def test_the_method_of_the_plugin_page_conforms(tmp_path, monkeypatch):
    code = next(text for text in blocks(ROOT / "docs/how-to/write-a-plugin.md", "python") if "class PullApart" in text)
    (tmp_path / "pull_apart.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_algorithm(importlib.import_module("pull_apart").PullApart)


def test_every_algorithm_has_a_page_of_at_most_60_lines_with_its_formula(plugins):
    for entry in plugins.registry.all():
        if issubclass(entry.cls, Algorithm):
            text = (ROOT / f"docs/algorithms/{entry.cls.name}.md").read_text("utf-8")
            assert len(text.splitlines()) <= 60
            assert f"# `{entry.cls.name}`" in text
            assert "    L = " in text


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose)
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []
