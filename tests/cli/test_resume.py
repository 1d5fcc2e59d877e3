"""Resuming from the command line: what is read back from a run folder, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.cli.resume import read_back
from prefopt.config import dump, resolved
from prefopt.errors import ConfigError, redact
from prefopt.plugins import load
from prefopt.testing.tiny import tiny_config


@pytest.fixture
def begun(tiny_model, tmp_path):
    """A function that leaves the folder of a run that has begun."""

    def make(name: str = "run", **sections) -> Path:
        folder = tmp_path / name
        config = tiny_config(tiny_model, folder, sections, load())
        folder.mkdir()
        (folder / "config.yaml").write_text(dump(redact(resolved(config))))
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
    config, _ = read_back(folder, [f"model.path={secret}"])
    assert config.model.path == str(secret)


def test_nothing_else_can_be_changed(begun):
    with pytest.raises(ConfigError, match="`optim.lr` cannot change while a run is resumed"):
        read_back(begun(), ["optim.lr=1"])
