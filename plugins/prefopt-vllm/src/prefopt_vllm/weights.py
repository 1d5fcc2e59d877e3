"""The trainer's weights: their version, their files, their checksums, and what the model says of a probe. It knows no
server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.api import LanguageModel, lazy_import

if TYPE_CHECKING:
    import safetensors.torch as files
    import torch
    from torch import Tensor
else:
    files = lazy_import("safetensors.torch")
    torch = lazy_import("torch")

PROBE = 32
STRIDE = 9973
"""Of the probe's tokens, modulo the vocabulary: a prime, so that they lie all over it."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that vLLM puts together, by the names that they have in it."""
PADDED_TO = 64
"""vLLM pads vocabularies with zeros to a multiple of that."""
INPUTS, OUTPUT = ("embed_tokens.weight", "wte.weight"), "lm_head.weight"
EMPTY = sha256().hexdigest()
"""The checksum of a matrix that vLLM keeps elsewhere, in the order its kernel likes."""


@dataclass(frozen=True)
class Weights:
    """The weights of a model as they are now."""

    model: LanguageModel
    limit: int | None = None
    """The most tokens that the server reads, where it was told of a number."""

    @cached_property
    def version(self) -> str:
        """A name that other weights do not have: a hash of all of them."""
        total = blake2b(digest_size=16)
        for name, x in sorted(self.model.network.state_dict().items()):
            total.update(f"{name} {x.dtype} {list(x.shape)}".encode())
            total.update(_bytes(x))
        return f"prefopt-{total.hexdigest()}"

    def written(self, root: Path) -> Path:
        """The folder under `root` with these weights, written unless it is there already."""
        folder = root / self.version
        if not folder.exists():
            partial = root / f".{self.version}.{os.getpid()}"
            self.model.export(partial)
            _untie(partial)
            try:
                partial.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(partial)
        return folder

    @cached_property
    def probe(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """A sequence of tokens, and the log-probability of each but the first, in nats."""
        vocabulary = self._logits([0]).shape[-1]
        room = min(limit for limit in (self.model.positions, self.limit, PROBE + 1) if limit is not None) - 1
        ids = [STRIDE * (i + 1) % vocabulary for i in range(room)]
        logps = torch.log_softmax(self._logits(ids).double(), dim=-1)
        chosen = logps[:-1].gather(1, torch.tensor(ids[1:], device=logps.device)[:, None]).squeeze(1)
        return tuple(ids), tuple(chosen.tolist())

    def _logits(self, ids: List[int]) -> Tensor:
        with torch.no_grad():
            out: Any = self.model.network(input_ids=torch.tensor([ids], device=self.model.device), use_cache=True)
        logits: Tensor = out.logits[0]
        return logits


def compared(folder: Path, found: Mapping[str, str], dtype: str) -> tuple[int, list[str]]:
    """How many of a server's checksums are those of the weights in `folder`, stored as `dtype`, and the names of those
    that are not. A server that is spread out holds parts of matrices, which cannot be compared: of it only what is
    equal counts."""
    own = _own(folder, dtype)
    whole = len({name.rpartition(":")[0] for name in found}) == 1
    equal, wrong = 0, []
    for place, digest in found.items():
        candidates = set(_candidates(own, place.rpartition(":")[2])) if digest != EMPTY else set()
        equal += digest in candidates
        if candidates and digest not in candidates and whole:
            wrong.append(place.rpartition(":")[2])
    return equal, wrong


def _untie(folder: Path) -> None:
    """Gives the output matrix of a tied model a file of its own: vLLM on a CPU makes a copy of it when it starts, and
    renews the copy only when that matrix is loaded."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tensors = _stored(folder)
    inputs = [x for name, x in tensors.items() if name.endswith(INPUTS)]
    if not config.get("tie_word_embeddings") or OUTPUT in tensors or len(inputs) != 1:
        return
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    files.save_file({**tensors, OUTPUT: inputs[0].clone()}, folder / "model.safetensors", {"format": "pt"})
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def _stored(folder: Path) -> dict[str, Tensor]:
    return {k: x for path in sorted(folder.glob("*.safetensors")) for k, x in files.load_file(path).items()}


def _own(folder: Path, dtype: str) -> dict[str, Tensor]:
    return {name: x.to(getattr(torch, dtype)) for name, x in _stored(folder).items()}


def _candidates(own: Mapping[str, Tensor], name: str) -> Iterator[str]:
    """The checksums that a server's matrix may have."""
    module, _, last = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    parts = [f"{parent}.{part}.{last}" for part in FUSED.get(leaf, (leaf,))] if parent else [name]
    if not all(part in own for part in parts):
        return
    x = torch.cat([own[part] for part in parts]) if len(parts) > 1 else own[parts[0]]
    yield sha256(_bytes(x)).hexdigest()
    if x.dim() == 2 and len(x) % PADDED_TO:
        yield sha256(_bytes(torch.nn.functional.pad(x, (0, 0, 0, -len(x) % PADDED_TO)))).hexdigest()


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
