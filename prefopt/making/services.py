"""What a stage that makes rows has at hand: its model, the models its components ask for, and how many tokens all of
them took."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefopt.components import Sampler
from prefopt.config.making import Making
from prefopt.data.adapt import adapt
from prefopt.data.render import Renderer
from prefopt.data.streams import derive
from prefopt.engine.models import Model, open_model
from prefopt.engine.rollout import draw
from prefopt.engine.services import EngineServices, RewardModel
from prefopt.engine.text_model import Reader
from prefopt.errors import ConfigError
from prefopt.plugins import Plugins
from prefopt.rows import Completion, Prompt, Rollout, Row, Text
from prefopt.sampling import Drawer, Request
from prefopt.session import default_sampler

if TYPE_CHECKING:
    import numpy as np


@dataclass
class MakingServices:
    """Implements `prefopt.revising.RevisingServices` for one stage."""

    config: Making
    plugins: Plugins
    device: torch.device
    folder: Path
    warn: Callable[[str], None]
    sampled: int = 0
    """Tokens drawn so far."""
    cut: int = 0
    """Replies that did not come to their end."""
    closing: ExitStack = field(default_factory=ExitStack)
    """What ends with the stage."""
    _readers: list[RewardModel | Reader] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Tokens read so far by models that score."""
        return sum(reader.tokens for reader in self._readers)

    def rng(self, *purpose: str | int) -> np.random.Generator:
        return self._engine.rng(*purpose)

    def kept(self, name: str) -> Path | None:
        return self._engine.kept(name)

    def scorer(self, path: str) -> RewardModel:
        self._readers.append(opened := self._engine.scorer(path))
        return opened

    def language_model(self, path: str) -> Reader:
        self._readers.append(opened := self._engine.language_model(path))
        return opened

    def writer(self, path: str | None) -> ModelWriter:
        return ModelWriter(self, self._model if path is None else open_model(path, self.device, self.warn))

    def draw(self, rows: List[Row], n: int) -> list[Rollout | None]:
        """`n` replies to the prompt of each row; None where the prompt is too long and rows may be dropped for that."""
        data, model = self.config.data, self._model
        renderer = Renderer(model.tokenizer, data.max_length or model.positions, data.overflow)
        drawn = draw(self._drawer, renderer, adapt(rows, Prompt), n, self.config.run.seed, "stage")
        self._count([completion for rollout in drawn for completion in rollout.completions])
        found = {rollout.index: rollout for rollout in drawn}
        return [found.get(row.index) for row in rows]

    def write(self, model: Model, requests: List[Request]) -> dict[int, Completion]:
        """The completion of each request, by its place."""
        drawn = dict((self._drawer if model is self._model else self.sampler.open(model))(requests))
        self._count(list(drawn.values()))
        return drawn

    @cached_property
    def sampler(self) -> Sampler:
        sampler = self.config.sampler or default_sampler(self.plugins)
        return self.closing.enter_context(sampler.running(self))

    @cached_property
    def _drawer(self) -> Drawer:
        return self.sampler.open(self._model)

    @cached_property
    def _model(self) -> Model:
        if self.config.model is None:
            raise ConfigError("replies are drawn, and there is no model", where="model")
        return open_model(self.config.model, self.device, self.warn)

    @cached_property
    def _engine(self) -> EngineServices:
        return EngineServices(self.config.run.seed, self.device, self.folder)

    def _count(self, drawn: List[Completion]) -> None:
        self.sampled += sum(len(completion.ids or ()) for completion in drawn)
        self.cut += sum(not completion.finished for completion in drawn)


@dataclass(frozen=True)
class ModelWriter:
    """Implements `prefopt.revising.Writer`. Control tokens that stand in a prompt are read as plain text."""

    services: MakingServices
    model: Model

    @property
    def chat(self) -> bool:
        return bool(self.model.tokenizer.chat_template)

    def __call__(self, prompts: List[Text], keys: List[str]) -> list[Completion | None]:
        room = None if self.model.positions is None else self.model.positions - 1
        renderer = Renderer(self.model.tokenizer, room, "drop", plain=True)
        openings = [renderer.opening(prompt) for prompt in prompts]
        fits = [i for i, opening in enumerate(openings) if opening is not None]
        seed = self.services.config.run.seed
        requests = [Request(openings[i] or (), derive(seed, "write", keys[i])) for i in fits]
        drawn = self.services.write(self.model, requests)
        found: dict[int, Any] = {i: drawn[place] for place, i in enumerate(fits)}
        return [found.get(i) for i in range(len(prompts))]
