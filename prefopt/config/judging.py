"""What `prefopt judge` may be told: who judges what, and where it goes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from prefopt.components import Judge
from prefopt.config.models import PluginsConfig, RowsConfig, RunDir, Section

Label = Annotated[str, Field(min_length=1, max_length=64)]


class JudgingConfig(Section):
    """Pairs, candidates or systems, and the judges that compare them."""

    prefopt: Literal[1]
    """The version of this format."""
    judge: Judge | None = None
    """Who judges."""
    judges: dict[Label, Judge] = Field({})
    """Several judges to evaluate, each under the name it has in the report."""
    data: RowsConfig | None = None
    """What is labelled, or what judges are evaluated on: comparisons, or rankings of several replies."""
    systems: dict[Label, RowsConfig] = Field({})
    """Whose replies are compared: for each, demonstrations that answer the same prompts."""
    baseline: Label | None = None
    """The system that the others are compared with. Default: every two are compared."""
    pairing: Literal["all", "ring"] = "all"
    """Which of several candidates are compared."""
    both_orders: bool = True
    """Whether each pair is judged in both orders, where a disagreement is a tie. Otherwise the order is drawn."""
    repeats: PositiveInt = 1
    """How often a judge under evaluation is asked the same: its self-consistency needs two."""
    batch: PositiveInt = 64
    """Pairs handed to the judge at a time; what they bring is written before the next."""
    max_missing: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The largest share of pairs without a verdict that is no failure."""
    out: RunDir
    """The folder everything is written to."""
    seed: NonNegativeInt = 0
    """Every random choice derives from it."""
    plugins: PluginsConfig = PluginsConfig()

    @model_validator(mode="after")
    def _somebody_judges(self) -> Self:
        if (self.judge is None) == (not self.judges):
            raise ValueError("write either `judge` or `judges`")
        if self.baseline is not None and self.baseline not in self.systems:
            raise ValueError(f"`baseline` is none of the systems: {', '.join(self.systems) or 'there are none'}")
        return self

    @property
    def named(self) -> dict[str, Judge]:
        """Every judge by its name in the report."""
        return dict(self.judges) if self.judge is None else {self.judge.name: self.judge}
