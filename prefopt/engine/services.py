"""What components may ask for: named random streams, saved models, a place to keep things."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from prefopt.components import Score
from prefopt.config import ModelConfig
from prefopt.data.render import Renderer, Tokens, find_model, load_tokenizer
from prefopt.data.streams import generator
from prefopt.engine.forward import Scorer as Module
from prefopt.engine.forward import run
from prefopt.engine.layout import units
from prefopt.engine.models import load_classifier, open_model, positions
from prefopt.engine.plan import plan
from prefopt.engine.text_model import Reader, reader
from prefopt.errors import ConfigError, DataError
from prefopt.rows import Rollout

TOKEN_BUDGET = 16_384


@dataclass(frozen=True)
class EngineServices:
    """Implements `prefopt.components.Services` for one seed and device; `folder` is where things are kept."""

    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: Path | None = None

    def rng(self, *purpose: str | int) -> np.random.Generator:
        return generator(self.seed, "component", *purpose)

    def scorer(self, path: str) -> RewardModel:
        """Raises `ConfigError` when there is no reward model at `path`."""
        if find_model(path) is None:
            raise ConfigError(f"there is no reward model at `{path}`")
        tokenizer = load_tokenizer(path)
        network = load_classifier(ModelConfig(path=path), tokenizer, seed=None)
        return RewardModel(Module(network).to(self.device), Renderer(tokenizer, positions(network.config)), self.device)

    def language_model(self, path: str) -> Reader:
        """Raises `ConfigError` when there is no model at `path`."""
        return reader(path, open_model(path, self.device), TOKEN_BUDGET)

    def kept(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


@dataclass
class RewardModel:
    """A reward model as a function of rollouts. It reads text through its own tokenizer; `tokens` counts what it
    read."""

    module: Module
    renderer: Renderer
    device: torch.device
    tokens: int = 0

    def __call__(self, groups: List[Rollout]) -> list[list[Score]]:
        flat = [
            self.renderer.tokens(group.prompt, replace(completion, ids=None))
            for group in groups
            for completion in group.completions
        ]
        self._refuse_longer(flat)
        scores = iter(self._scores(flat, [i for i, group in enumerate(groups) for _ in group.completions]))
        return [[Score(next(scores)) for _ in group.completions] for group in groups]

    def _refuse_longer(self, tokens: List[Tokens]) -> None:
        limit, longest = self.renderer.max_length, max(map(len, tokens), default=0)
        if limit is not None and longest > limit:
            raise DataError(f"prompt and reply have {longest} tokens, more than the {limit} the reward model can read")

    @torch.no_grad()
    def _scores(self, tokens: List[Tokens], groups: List[int]) -> list[float]:
        self.tokens += sum(map(len, tokens))
        scores: dict[int, float] = {}
        for micro in plan(units(tokens, groups, self.module.paths), TOKEN_BUDGET)[0]:
            part, own = [tokens[i] for i in micro.index], [groups[i] for i in micro.index]
            found = run(self.module, part, ("scores",), self.device, groups=own)["scores"]
            scores.update(zip(micro.index, found.tolist(), strict=True))
        return [scores[i] for i in range(len(tokens))]
