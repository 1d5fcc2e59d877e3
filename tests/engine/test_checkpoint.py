from __future__ import annotations

import json
import random

import pytest
import torch

from prefopt.engine import checkpoint as checkpoints
from prefopt.engine.checkpoint import Checkpoint
from prefopt.errors import ResourceError


def made(value: float) -> Checkpoint:
    weights = {"a": torch.full((3, 2), value), "b": torch.tensor(value)}
    return Checkpoint({"model": weights, "optimizer": {"a.step": torch.tensor(7.0)}}, {"step": int(value)})


def test_what_is_saved_is_loaded(tmp_path):
    checkpoints.save(tmp_path, 5, made(5))
    step, found = checkpoints.latest(tmp_path)
    assert (step, found.state) == (5, {"step": 5})
    assert torch.equal(found.tensors["model"]["a"], torch.full((3, 2), 5.0))
    assert found.tensors["optimizer"]["a.step"].item() == 7.0


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path):
    folder = checkpoints.save(tmp_path, 1, made(1))
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"}
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert (manifest["schema"], manifest["step"], set(manifest["files"])) == (1, 1, names - {"MANIFEST.json"})


def test_tied_tensors_are_stored_once(tmp_path):
    shared = torch.ones(2)
    checkpoints.save(tmp_path, 1, Checkpoint({"model": {"a": shared, "b": shared}}, {}))
    _, found = checkpoints.latest(tmp_path)
    assert list(found.tensors["model"]) == ["a"]


def test_the_newest_whole_one_is_used_and_a_damaged_one_set_aside(tmp_path):
    checkpoints.save(tmp_path, 1, made(1))
    newest = checkpoints.save(tmp_path, 2, made(2))
    (newest / "state.json").write_text("{}")
    step, _ = checkpoints.latest(tmp_path)
    assert step == 1
    assert [p.name.startswith(".corrupt-step-00000002") for p in tmp_path.iterdir() if "corrupt" in p.name] == [True]


def test_any_changed_byte_is_noticed(tmp_path):
    folder = checkpoints.save(tmp_path, 1, made(1))
    draw = random.Random(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(12):
            at = draw.randrange(len(whole))
            damaged = whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
            path.write_bytes(damaged)
            with pytest.raises((ValueError, KeyError, ResourceError, OSError)):
                checkpoints.load(folder)
        path.write_bytes(whole)
    assert checkpoints.load(folder)[0] == 1


@pytest.mark.parametrize("harm", ["missing", "extra", "truncated"])
def test_other_files_than_the_manifest_names_are_noticed(tmp_path, harm):
    folder = checkpoints.save(tmp_path, 1, made(1))
    path = folder / "model.safetensors"
    if harm == "missing":
        path.unlink()
    elif harm == "extra":
        (folder / "more.safetensors").write_bytes(path.read_bytes())
    else:
        path.write_bytes(path.read_bytes()[:-5])
    assert checkpoints.latest(tmp_path) is None


def test_a_newer_format_is_refused_with_both_numbers(tmp_path):
    folder = checkpoints.save(tmp_path, 1, made(1))
    manifest = json.loads((folder / "MANIFEST.json").read_text()) | {"schema": 9}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(ResourceError, match="format 9, this prefopt reads format 1"):
        checkpoints.load(folder)


def test_rotation_keeps_the_newest_and_the_protected_and_sweeps_leftovers(tmp_path):
    for step in range(1, 7):
        checkpoints.save(tmp_path, step, made(step))
    (tmp_path / ".tmp-left").mkdir()
    checkpoints.rotate(tmp_path, keep=2, protect=[3])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000005", "step-00000006"]


def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 1, made(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_sync", full)
    with pytest.raises(ResourceError, match="No space left"):
        checkpoints.save(tmp_path, 2, made(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_loading_weights_that_do_not_fit_names_them():
    net = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing \['bias'\], unexpected \['other'\]"):
        checkpoints.load_tied(net, {"weight": torch.zeros(2, 2), "other": torch.zeros(1)})
