"""The settings of PPO, and which of them do not go together."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from prefopt.api import RolloutAlgorithm

HORIZON = 10_000


class Settings(RolloutAlgorithm):
    """What can be set. Defaults are those of `The N+ implementation details`, where it says them."""

    act_elsewhere: ClassVar[frozenset[str]] = RolloutAlgorithm.act_elsewhere | {"ratio_limit", "update_limit"}
    moves: ClassVar[tuple[int | None, int | None]] = (None, None)

    inner_epochs: PositiveInt = 4
    """Passes over the samples of a step."""
    n: PositiveInt = 1
    """Samples for each prompt."""

    beta: NonNegativeFloat = 0.05
    """The price of a nat of KL divergence from the reference; 0: no reference is needed."""
    kl_in: Literal["reward", "loss"] | None = None
    """Where it is paid: in each token's reward, or as a term of the loss. `reward` if not given."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """How it is estimated: k1 in the reward and k2 in the loss if not given. k1 in the loss is refused: its gradient is
    0 in expectation."""
    kl_target: PositiveFloat | None = None
    """The KL divergence of a whole reply, in nats, that beta is adapted to; not set, beta stays."""
    kl_horizon: PositiveInt | None = None
    """Samples in which beta adapts, 10,000 if not given."""

    normalise: Literal["scale", "standardise"] | None = None
    """Divide scores by their running standard deviation; `standardise` subtracts their running mean before."""
    score_clip: PositiveFloat | None = None
    """Scores beyond ± this count as ± this, after they were normalised and before KL is paid."""
    truncated: Literal["replace", "end", "bootstrap", "drop"] = "replace"
    """A reply that was cut before its end: `replace` gives it `truncated_score`, `end` takes it for ended, `bootstrap`
    lets the value before its last token stand for what would have come, `drop` leaves it out."""
    truncated_score: float | None = None
    """The score of a reply that was cut, in place of its own, before scores are normalised; -1 if not given."""

    discount: float = Field(1.0, ge=0, le=1)
    """γ, what a reward one token later is worth."""
    decay: float = Field(0.95, ge=0, le=1)
    """λ of generalized advantage estimation: 1 trusts rewards alone, 0 the next value."""
    whiten_advantages: bool = True
    """Give advantages mean 0 and variance 1 over the tokens of a step."""

    clip: float = Field(0.2, gt=0, lt=1)
    """ε: a ratio below 1 - ε, or above 1 + ε, has gone far enough."""
    clip_high: PositiveFloat | None = None
    """ε above, as `clip` if not given."""
    dual_clip: float | None = Field(None, gt=1)
    """The most that a ratio can weigh a negative advantage with; not set, anything."""
    value_clip: PositiveFloat | None = 0.2
    """How far a value may move from the one before the step; null: anywhere."""
    value_weight: PositiveFloat = 0.1
    """The weight of the value loss."""
    entropy: NonNegativeFloat = 0.0
    """The weight of an entropy bonus."""
    importance_cap: PositiveFloat | None = None
    """Weigh tokens by how likely they are to the trainer and the sampler, e^(difference), at most this."""

    ratio_limit: PositiveFloat | None = None
    """Skip a minibatch whose mean ratio is above."""
    update_limit: PositiveFloat | None = None
    """Leave out the rest of a step's passes when KL(old || new) of a token, in nats, is above."""

    @property
    def charged(self) -> Literal["reward", "loss"]:
        """Where KL is paid."""
        return self.kl_in or "reward"

    @property
    def estimator(self) -> Literal["k1", "k2", "k3"]:
        """How KL is estimated."""
        return self.kl_estimator or ("k1" if self.charged == "reward" else "k2")

    @property
    def high(self) -> float:
        """ε above."""
        return self.clip if self.clip_high is None else self.clip_high

    @property
    def horizon(self) -> int:
        """Samples in which beta adapts."""
        return HORIZON if self.kl_horizon is None else self.kl_horizon

    @model_validator(mode="after")
    def _settings_that_belong_together(self) -> Self:
        said = [key for key in ("kl_in", "kl_estimator", "kl_target") if getattr(self, key) is not None]
        if not self.beta and said:
            raise ValueError(f"{' and '.join(said)} mean nothing without beta: set it, or leave them out")
        if self.charged == "loss" and self.kl_estimator == "k1":
            raise ValueError("k1 in the loss has no gradient in expectation: use k2 or k3, or kl_in: reward")
        if self.kl_horizon is not None and self.kl_target is None:
            raise ValueError("kl_horizon means nothing without kl_target")
        if self.truncated_score is not None and self.truncated != "replace":
            raise ValueError(f"truncated_score means nothing with truncated: {self.truncated}")
        return self
