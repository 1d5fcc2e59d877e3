"""A language model asked for the probabilities of a few words. It reads text that nobody vouches for: control tokens in
it are read as plain text. It knows no judge and no rubric."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from prefopt.data.render import Renderer, Tokens, find_model
from prefopt.engine.folder import digest
from prefopt.engine.forward import Scorer
from prefopt.engine.models import Model
from prefopt.engine.reference import Resident
from prefopt.errors import DataError
from prefopt.rows import Text

WEIGHTS = ("config.json", "tokenizer.json", "*.safetensors")


@dataclass
class Reader:
    """Implements `prefopt.components.TextModel`; `tokens` counts what it read."""

    path: str
    resident: Resident
    renderer: Renderer
    tokens: int = 0

    @property
    def chat(self) -> bool:
        return bool(self.renderer.tokenizer.chat_template)

    @property
    def identity(self) -> str:
        """A hub name stands for itself: its files are in a cache that this does not look into."""
        folder = find_model(self.path)
        return self.path if folder is None else hashed(folder)

    def logps(self, prompts: List[Text], endings: List[str]) -> list[list[float]]:
        tokens = [part for prompt in prompts for part in self._read(prompt, endings)]
        self.tokens += sum(map(len, tokens))
        groups = [i for i in range(len(prompts)) for _ in endings]
        sums = iter([float(x.double().sum()) for x in self.resident.logps(tokens, groups)])
        return [[next(sums) for _ in endings] for _ in prompts]

    def _read(self, prompt: Text, endings: List[str]) -> list[Tokens]:
        tokens = self.renderer.endings(prompt, endings)
        limit = self.renderer.max_length
        if limit is not None and max(map(len, tokens)) > limit:
            raise DataError(f"the question has more tokens than the {limit} the model can read")
        return tokens


def reader(path: str, model: Model, budget: int) -> Reader:
    """A model as something to ask."""
    renderer = Renderer(model.tokenizer, model.positions, plain=True)
    return Reader(path, Resident(Scorer(model.network), model.device, budget), renderer)


def hashed(folder: Path) -> str:
    """A hash of what makes a model what it is."""
    paths = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return sha256("\n".join(f"{path.name} {digest(path)}" for path in paths).encode()).hexdigest()
