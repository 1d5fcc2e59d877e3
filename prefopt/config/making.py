"""Stages that make rows: what each kind may be told, and the constitution that some of them follow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Self, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from prefopt.components import Judge, RewardSource, Sampler, UserPath
from prefopt.config.models import ModelConfig, PluginsConfig, RowsConfig, RunDir, Section
from prefopt.revising import Principle, Reviser
from prefopt.rows import Comparison, Demonstration, Ranking, Row

ROWS: Final = "rows.jsonl"
"""The file of a stage that makes rows."""


class MakingSection(Section):
    """Where and how rows are made."""

    dir: RunDir
    """The folder everything is written to."""
    seed: NonNegativeInt = 0
    """Every random choice derives from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: PositiveInt | None = None
    """CPU threads."""


class _Making(Section):
    """What all kinds have in common."""

    prefopt: Literal[1]
    """The version of this format."""
    data: RowsConfig
    """The prompts."""
    sampler: Sampler | None = None
    """How replies are drawn. Default: `continuous`."""
    batch: PositiveInt = 256
    """Rows that are worked on at a time; what they bring is written before the next."""
    max_missing: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The largest share of rows without a result that is no failure."""
    run: MakingSection
    plugins: PluginsConfig = PluginsConfig()

    @property
    def rows(self) -> Path:
        """The file it makes."""
        return Path(self.run.dir) / ROWS


class SampleConfig(_Making):
    """Draws replies."""

    kind: Literal["sample"]
    model: ModelConfig
    """The model that replies."""
    n: PositiveInt = 1
    """Replies for each prompt. One is a demonstration; several are candidates, all of the same rank."""
    self_play: bool = False
    """Whether the one reply drawn is written as worse than the row's own, which is what SPIN learns from (Chen et al.
    2024, arXiv:2401.01335, algorithm 1)."""

    @model_validator(mode="after")
    def _one_against_one(self) -> Self:
        if self.self_play and self.n != 1:
            raise ValueError("`self_play` sets one reply against the row's own: leave `n` out")
        return self

    @property
    def makes(self) -> type[Row]:
        """The kind of its rows."""
        if self.self_play:
            return Comparison
        return Demonstration if self.n == 1 else Ranking


class LabelConfig(_Making):
    """Lets a judge compare replies."""

    kind: Literal["label"]
    model: ModelConfig | None = None
    """The model that replies, where `n` asks for replies."""
    n: Annotated[int, Field(ge=2)] | None = None
    """Replies to draw for each prompt. Default: none; the rows bring replies of their own."""
    judge: Judge
    """Who judges."""
    pairing: Literal["all", "ring"] = "all"
    """Which of several replies are compared."""
    both_orders: bool = True
    """Whether each pair is judged in both orders, where a disagreement is a tie. Otherwise the order is drawn."""
    constitution: UserPath | None = None
    """A file with principles. One is drawn for each row, and the judge is told of it."""

    @property
    def makes(self) -> type[Row]:
        """The kind of its rows; without `n`, at least: replies that were ranked stay so."""
        return Comparison if self.n is None or self.n == 2 else Ranking


class ReviseConfig(_Making):
    """Lets a reply be criticised and revised by principles."""

    kind: Literal["revise"]
    model: ModelConfig
    """The model that writes the drafts."""
    constitution: UserPath
    """A file with principles. One is drawn for each row and round."""
    reviser: Reviser
    """Who criticises and revises."""
    rounds: PositiveInt = 1
    """How often a reply is criticised and revised. No principle comes twice before all have come."""
    measure: RewardSource | None = None
    """What drafts and revisions are worth is said in `result.json`. The reviser never sees it."""

    makes: ClassVar[type[Row]] = Demonstration


Making: TypeAlias = SampleConfig | LabelConfig | ReviseConfig
MAKING: Final[dict[str, type[SampleConfig] | type[LabelConfig] | type[ReviseConfig]]] = {
    "sample": SampleConfig,
    "label": LabelConfig,
    "revise": ReviseConfig,
}


class Constitution(Section):
    """Principles that replies are criticised, revised and compared by."""

    principles: Annotated[tuple[Principle, ...], Field(min_length=1)]
