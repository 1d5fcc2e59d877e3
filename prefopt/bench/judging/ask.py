"""What judges may ask for where no model is trained. Loads torch only for a judge that asks for one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.components import Scorer, Services, TextModel
from prefopt.config.judging import JudgingConfig
from prefopt.data.streams import generator

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class JudgeServices:
    """Implements `prefopt.components.Services` without loading torch before a model is asked for."""

    seed: int
    folder: Path

    def rng(self, *purpose: str | int) -> np.random.Generator:
        return generator(self.seed, "component", *purpose)

    def kept(self, name: str) -> Path:
        return self.folder / name

    def scorer(self, path: str) -> Scorer:
        return self._engine.scorer(path)

    def language_model(self, path: str) -> TextModel:
        return self._engine.language_model(path)

    @cached_property
    def _engine(self) -> Services:
        from prefopt.engine.services import EngineServices

        return EngineServices(self.seed, folder=self.folder)


def services_of(config: JudgingConfig) -> JudgeServices:
    """What judges may ask for; replies are kept in the folder of the output."""
    return JudgeServices(config.seed, Path(config.out))
