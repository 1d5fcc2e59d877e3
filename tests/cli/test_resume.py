"""Resuming from the command line: what is read back from a run folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefopt.cli.app import app
from prefopt.cli.resume import read_back
from prefopt.config import anchored, dump, resolved
from prefopt.engine.folder import digest
from prefopt.errors import ConfigError, DataError, PrefoptError, redact
from prefopt.plugins import load
from prefopt.session import train
from prefopt.testing.tiny import tiny_config, tiny_rows, write_rows


@pytest.fixture
def begun(tiny_model, tmp_path):
    """A function that leaves the folder of a run that has begun."""

    def make(name: str = "run", **sections) -> Path:
        folder = tmp_path / name
        config = tiny_config(tiny_model, folder, sections, load())
        folder.mkdir()
        (folder / "config.yaml").write_text(dump(redact(resolved(anchored(config)))))
        return folder

    return make


def test_a_secret_that_was_not_written_is_asked_for(begun, tmp_path, tiny_model, monkeypatch):
    secret = tmp_path / "planted-secret"
    secret.symlink_to(tiny_model)
    monkeypatch.setenv("MY_ACCESS_TOKEN", "planted-secret")
    folder = begun(model={"path": str(secret)})
    with pytest.raises(ConfigError) as caught:
        read_back(folder, [])
    (problem,) = caught.value.problems
    assert problem.what == "`model.path` holds a secret, which is not written to a run folder"
    assert problem.where.startswith(f"{folder}/config.yaml:")
    assert problem.fix == f"Give it again: prefopt resume {folder} model.path=VALUE"
    config, *_ = read_back(folder, [f"model.path={secret}"])
    assert config.model.path == str(secret)


def test_nothing_else_can_be_changed(begun):
    with pytest.raises(ConfigError, match="`optim.lr` cannot change while a run is resumed"):
        read_back(begun(), ["optim.lr=1"])


def test_a_run_is_resumed_from_any_folder_whatever_it_is_called(begun, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", tiny_rows("demonstration"))
    monkeypatch.chdir(tmp_path)
    folder = begun("7", data={"source": "jsonl", "path": "rows.jsonl"}, run={"steps": 1})
    (tmp_path / "elsewhere").mkdir()
    for place, name in ((tmp_path / "elsewhere", "../7"), (folder, "."), (tmp_path, "7")):
        monkeypatch.chdir(place)
        config, *_ = read_back(Path(name), [])
        assert (config.run.dir, config.data.source.path) == (name, str(tmp_path / "rows.jsonl"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = CliRunner().invoke(app, ["resume", "../7"])
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "finished: ../7/model")


def test_a_run_folder_names_files_by_absolute_paths_and_its_card_no_home(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows("demonstration"))
    plugins = load()
    sections = {"data": {"source": "jsonl", "path": "~/rows.jsonl"}, "run": {"steps": 1}}
    result = train(tiny_config(tiny_model, tmp_path / "run", sections, plugins), plugins)
    assert f"path: {rows}" in (result.folder / "config.yaml").read_text()
    card = (result.model / "README.md").read_text()
    assert "path: ~/rows.jsonl" in card
    assert str(tmp_path) not in card


def test_data_that_changed_is_refused_and_other_versions_are_a_warning(begun, tmp_path):
    data = write_rows(tmp_path / "mine.jsonl", tiny_rows("demonstration"))
    folder = begun(data={"source": "jsonl", "path": str(data)}, run={"steps": 1})
    info = {"data": {str(data): "0" * 64}, "versions": {"torch": "0.1"}, "algorithm": {"version": "0.1.0"}}
    (folder / "run.json").write_text(json.dumps(info))
    config, plugins, _ = read_back(folder, [])
    with pytest.raises(DataError, match="the file changed since the run began") as caught:
        train(config, plugins, resume=True)
    assert caught.value.problems[0].where == str(data)
    info["data"][str(data)] = digest(data)
    (folder / "run.json").write_text(json.dumps(info))
    warnings: list[str] = []
    train(config, plugins, resume=True, warn=warnings.append)
    assert any(text.startswith("the run began with torch 0.1 and goes on with ") for text in warnings)
    assert not any("prefopt 0.1.0" in text for text in warnings)


def test_a_folder_without_a_run_gets_advice_that_fits(tmp_path):
    with pytest.raises(PrefoptError) as caught:
        read_back(tmp_path / "nowhere", [])
    assert caught.value.exit_code == 2
    assert "prefopt train" in caught.value.problems[0].fix


def test_a_folder_of_rows_goes_on_with_its_stages(tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "config.yaml").write_text("kind: label\n")
    with pytest.raises(ConfigError, match="rows are made here, and no model is trained"):
        read_back(folder, ())
