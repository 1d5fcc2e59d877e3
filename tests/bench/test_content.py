"""Finished work is kept only as long as everything it depends on is the same."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from prefopt.bench import content
from prefopt.bench.content import dependencies, fingerprint, key_of, plain

RUN = """\
prefopt: 1
model: {{path: {model}}}
data: {{source: jsonl, path: {data}}}
algorithm: {{name: dpo}}
eval:
  every: 1
  data: {{source: jsonl, path: {held_out}}}
  tasks: [{{name: gold_reward, reward: {{name: {reward}}}}}]
run: {{dir: runs/one}}
"""


@pytest.fixture
def place(tmp_path, run_config, plugins):
    """A folder with data and a model, and the key of a run that uses them."""
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "model/model.safetensors", "data.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(name)

    def key(reward: str = "replies_gold", model: str = "") -> str:
        files = {"data": tmp_path / "data.jsonl", "held_out": tmp_path / "held_out.jsonl"}
        config = run_config(RUN.format(model=model or tmp_path / "model", reward=reward, **files))
        return key_of(dependencies(config, plugins.find))

    return tmp_path, key


@pytest.mark.parametrize("name", ["data.jsonl", "held_out.jsonl", "model/config.json", "model/model.safetensors"])
def test_changed_content_under_the_same_name_is_other_work(place, name):
    folder, key = place
    before = key()
    assert key() == before
    (folder / name).write_text("something else")
    assert key() != before


def test_a_file_that_a_judge_reads_counts_and_its_cache_does_not(tmp_path, plugins):
    (tmp_path / "verdicts.jsonl").write_text("{}")
    (tmp_path / "cache.sqlite").write_text("kept")
    replay = plugins.find("judge", "replay")(path=str(tmp_path / "verdicts.jsonl"))
    local = plugins.find("judge", "local")(path="nowhere", cache=str(tmp_path / "cache.sqlite"))
    files = dependencies([replay, local], plugins.find)["files"]
    assert files == {str(tmp_path / "verdicts.jsonl"): sha256(b"{}").hexdigest()}


def test_the_file_of_a_reward_function_counts_and_the_program_of_a_server_does_not(tmp_path, plugins):
    (code := tmp_path / "worth.py").write_text("def worth(prompt, completions, row): return [0.0 for _ in completions]")
    (program := tmp_path / "python").write_text("")
    reward = plugins.find("reward", "function")(function=f"{code}:worth")
    sampler = plugins.find("sampler", "vllm")(serve={"python": str(program)})
    assert dependencies([reward, sampler], plugins.find)["files"].keys() == {str(code)}


def test_what_is_not_read_does_not_count(place):
    folder, key = place
    before = key()
    (folder / "model/README.md").write_text("A card.")
    (folder / "other.jsonl").write_text("{}")
    assert key() == before


def test_files_that_are_not_there_are_left_to_the_check_of_the_run(place):
    folder, key = place
    (folder / "data.jsonl").unlink()
    assert key() == key()


def test_another_version_of_a_library_is_other_work(place, monkeypatch):
    _, key = place
    before = key()
    monkeypatch.setattr(content, "_versions", lambda: (("torch", "9.9"),))
    assert key() != before


def test_the_code_of_every_component_counts(place, plugins, run_config, monkeypatch):
    folder, _ = place
    files = {"data": folder / "data.jsonl", "held_out": folder / "held_out.jsonl"}
    config = run_config(RUN.format(model="world:replies", reward="replies_gold", **files))
    assert set(dependencies(config, plugins.find)["code"]) == {"prefopt", "prefopt_dpo"}
    owners = {"replies_gold": "gold_package", "replies": "world_package", "gold_reward": "task_package"}
    for kind, name in (("reward", "replies_gold"), ("world", "replies"), ("task", "gold_reward")):
        monkeypatch.setattr(plugins.find(kind, name), "__module__", f"{owners[name]}.inner")
    monkeypatch.setattr(content, "fingerprint", lambda name: name)
    assert set(dependencies(config, plugins.find)["code"]) == {"prefopt", "prefopt_dpo", *owners.values()}


@pytest.mark.parametrize(
    "layout", ["some_method/__init__.py", "some_method.py", "some_method/inner.py", "some_method/inner.cpp"]
)
def test_a_changed_line_of_code_is_other_work(tmp_path, monkeypatch, layout):
    file = tmp_path / layout
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".cpp":
        (file.parent / "__init__.py").touch()
    file.write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_method", raising=False)
    before = fingerprint("some_method")
    file.write_text("x = 2\n")
    fingerprint.cache_clear()
    assert fingerprint("some_method") != before
    fingerprint.cache_clear()


@pytest.mark.parametrize("text", ["x" * 5000, "nul\0byte", "~nobody-has-this-name/x", "org/name"])
def test_text_that_is_no_folder_is_only_text(text, plugins):
    assert dependencies([text], plugins.find)["models"] == {}


def test_plain_data_loads_again_and_hides_nothing(run_config, monkeypatch, tmp_path):
    monkeypatch.setenv("MADE_UP_TOKEN", "held_out")
    text = RUN.format(model="world:replies", data="a.jsonl", held_out=Path("held_out.jsonl"), reward="replies_gold")
    config = run_config(text)
    assert plain(config)["eval"]["data"]["path"] == "held_out.jsonl"
    assert run_config(json.dumps(plain(config))) == config
