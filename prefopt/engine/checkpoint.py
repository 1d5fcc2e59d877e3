"""Checkpoints: a folder of safetensors and JSON with a manifest of sha256 sums, written aside and renamed.

A folder either is whole or is not there. A damaged one is set aside as `.corrupt-...` and the one before it is used. No
pickle is ever written or read.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefopt.engine.folder import digest
from prefopt.errors import ResourceError

SCHEMA = 1
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named groups of tensors, and plain data."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def folder_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def save(root: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Writes `root/step-NNNNNNNN`; a reader never sees half of it."""
    final = root / folder_name(step)
    partial = root / f".tmp-{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            save_file(_unshared(tensors), partial / f"{name}.safetensors")
        _write_json(partial / "state.json", checkpoint.state)
        files = {
            path.name: {"sha256": digest(path), "bytes": path.stat().st_size} for path in sorted(partial.iterdir())
        }
        _write_json(partial / MANIFEST, _signed({"schema": SCHEMA, "step": step, "files": files}))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(root)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ResourceError(f"the checkpoint could not be written: {error.strerror}", where=str(final)) from None
    return final


def latest(root: Path, set_aside: bool = True) -> tuple[int, Checkpoint] | None:
    """The newest whole checkpoint and its step; damaged ones are set aside. None when there is none."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            return load(folder)
        except (ValueError, OSError, KeyError, SafetensorError):
            if set_aside:
                folder.rename(root / f".corrupt-{folder.name}-{uuid.uuid4().hex[:8]}")
    return None


def load(folder: Path) -> tuple[int, Checkpoint]:
    """A checkpoint and its step. Raises `ValueError` when anything in it differs from its manifest."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    if manifest["schema"] != SCHEMA:
        raise ResourceError(
            f"the checkpoint has format {manifest['schema']}, this prefopt reads format {SCHEMA}", where=str(folder)
        )
    if manifest != _signed({key: manifest[key] for key in ("schema", "step", "files")}):
        raise ValueError(f"{folder / MANIFEST} was changed")
    for name, facts in manifest["files"].items():
        if digest(folder / name) != facts["sha256"]:
            raise ValueError(f"{folder / name} differs from its manifest")
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if present != set(manifest["files"]):
        raise ValueError(f"{folder} holds other files than its manifest")
    tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    state = json.loads((folder / "state.json").read_text("utf-8"))
    return int(manifest["step"]), Checkpoint(tensors, state)


def rotate(root: Path, keep: int, protect: Iterable[int] = ()) -> None:
    """Deletes all but the newest `keep` checkpoints and the protected steps, and leftovers of interrupted writes."""
    safe = {folder_name(step) for step in protect}
    for folder in sorted(root.glob("step-*"))[:-keep]:
        if folder.name not in safe:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a sum of its own."""
    return {**manifest, "sha256": sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One name for each storage: safetensors refuses tied weights under two."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if x.data_ptr() not in seen or x.numel() == 0:
            out[name] = x.detach().cpu().contiguous()
            seen.add(x.data_ptr())
    return out


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", "utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_tied(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads a state from which tensors shared under several names may have been left out but for one, and parameters
    that are not trained altogether."""
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    own = module.state_dict()
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    shared = {own[name].data_ptr() for name in tensors if name in own}
    lost = [name for name in missing if own[name].data_ptr() not in shared and name not in frozen]
    if lost or unexpected:
        raise ValueError(f"the weights do not fit the model: missing {lost}, unexpected {unexpected}")
