"""What a configuration may say. Pydantic models, frozen, unknown keys refused; the string under a field is its
documentation.

This module knows no component by name: sections such as `algorithm` hold whatever the installed plugins offer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_serializer,
    model_validator,
)

from prefopt.batch import Draw
from prefopt.components import Algorithm, DataSource, RewardSource, Sampler, Task, UserPath, expanded

NAME_RULE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def _checked_name(value: str) -> str:
    if not NAME_RULE.fullmatch(value):
        raise ValueError("a name is 1 to 64 of `a-z 0-9 . _ -` and starts with a letter or digit")
    return value


def _checked_dir(value: str) -> str:
    if ".." in Path(value).parts:
        raise ValueError("a run folder may not climb with `..`")
    _checked_name(Path(value).name)
    return expanded(value)


Name = Annotated[str, AfterValidator(_checked_name)]
RunDir = Annotated[str, AfterValidator(_checked_dir)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class LoraConfig(Section):
    """Low-rank adapters in place of all weights (Hu et al. 2021, arXiv:2106.09685); needs the extra `prefopt[lora]`."""

    rank: PositiveInt | None = None
    """The rank of an adapter (default 16)."""
    alpha: PositiveFloat | None = None
    """Its scale is alpha / rank (default 32)."""
    targets: Literal["all-linear"] | tuple[str, ...] | None = None
    """The layers that get one, by the ends of their names; default `all-linear`: every linear layer but the head."""
    path: UserPath | None = None
    """An adapter to go on with. The reference is then the model with this adapter, as the run found it."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("rank", "alpha", "targets") if getattr(self, name) is not None]
        if self.path is not None and given:
            raise ValueError(f"the adapter at `path` brings its own {', '.join(given)}: leave them out")
        return self


class ModelConfig(Section):
    """The model to train."""

    path: UserPath
    """A folder with a Hugging Face model, or `world:NAME` for the untrained base model of a world."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """The attention implementation of transformers."""
    trust_remote_code: bool = False
    """Whether code that came with the model may run. It never does unless this says so."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and leave the weights as they are. The run's `model` is the two merged, its `adapter` the
    adapters alone."""
    embedding_noise: PositiveFloat | None = None
    """Alpha of NEFTune (Jain et al. 2023, arXiv:2310.05914), which tries 5, 10 and 15: passes with gradient, and no
    others, add noise to the vectors of tokens, uniform in [-1, 1] times alpha / sqrt(L d) in a sequence of L tokens
    whose vectors are d wide. Sequences of a group then share nothing, which takes longer. Refused where replies are
    drawn while training: methods compare these log-probabilities with those that replies were drawn with."""


class RowsConfig(Section):
    """Rows: a data source with its own keys, and how its text becomes tokens."""

    source: DataSource
    """Where the rows come from; its settings stand beside it."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """The most tokens a prompt and its completion may have together."""
    overflow: Literal["stop", "drop", "truncate"] = "stop"
    """What to do with longer sequences: stop with an error, drop their row, or cut the prompt's start, then the
    completion's end. Dropped and cut rows are counted."""
    train_on: Literal["last", "all"] = "last"
    """Which assistant turns of a demonstration are trained on: the last, or all of them."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """What to do with rows that cannot be used: stop and report them all, or drop them and write them to
    `rejects.jsonl` in the run folder."""
    max_bad_rows: PositiveInt | Share | None = None
    """The most rows that may be dropped, as a number, or below 1 as a share. Default: 0.05."""

    @model_validator(mode="after")
    def _a_cap_is_for_dropping(self) -> Self:
        if self.max_bad_rows is not None and self.on_bad_row != "drop":
            raise ValueError("`max_bad_rows` needs `on_bad_row: drop`")
        return self

    @model_validator(mode="before")
    @classmethod
    def _nest_source(cls, value: Any) -> Any:
        if not isinstance(value, dict) or isinstance(value.get("source"), dict | DataSource):
            return value
        own = {k: v for k, v in value.items() if k in cls.model_fields and k != "source"}
        rest = {k: v for k, v in value.items() if k not in own}
        return {**own, "source": rest} if "source" in rest else value

    @model_serializer(mode="wrap")
    def _flatten_source(self, handler: Any) -> dict[str, Any]:
        data = handler(self)
        return {**data.pop("source"), **data}


class MixConfig(RowsConfig):
    """A second source that is joined to each step: its rows become demonstrations, and their negative log-likelihood
    is added to the loss (PPO-ptx, arXiv:2203.02155, eq. 2; regularisation by supervised fine-tuning)."""

    weight: PositiveFloat = 1.0
    """What their mean negative log-likelihood per token is multiplied with."""
    batch_size: PositiveInt | None = None
    """Rows of the second source in each step. Default: `optim.batch_size`."""


class DataConfig(RowsConfig):
    """The rows to train on."""

    mix: MixConfig | None = None
    """A second source of demonstrations that is joined to each step."""


class OptimConfig(Section):
    """The optimizer: fused AdamW."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    batch_size: PositiveInt = 32
    """Rows of the data source in one step, over all ranks."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up, to `final_lr` times its peak."""
    warmup: NonNegativeFloat = Field(0.0, lt=1)
    """Share of the updates over which the learning rate rises from 0."""
    final_lr: NonNegativeFloat = Field(0.0, le=1)
    """The last learning rate as a share of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the running mean of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of AdamW."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients with a larger norm are scaled down to it."""
    token_budget: PositiveInt | None = None
    """The most tokens, padding included, in one forward pass; it changes memory and speed, not the numbers. Default:
    1,024 on a CPU, 8,192 there for models of up to 10 million weights, 16,384 on CUDA."""
    forward: Literal["fast", "plain"] = "fast"
    """`fast` takes every shortcut that agrees with the plain path on this model; `plain` takes none."""
    head_bytes: NonNegativeInt | None = None
    """What the fast path may keep of the logits of one forward pass; beyond it they are computed again. Default: a byte
    for each weight outside of the vocabulary, at least 64 MB and at most 256 MB."""
    gradient_checkpointing: bool = False
    """Keep the inputs of each layer only and compute the rest again in the backward pass: less memory, a third more
    time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass. Weights, optimizer and log-probabilities are float32 always."""


class ReferenceConfig(Section):
    """The model that log-probabilities are compared with. Default: the policy as it starts."""

    path: UserPath | None = None
    """Another model as reference."""
    mode: Literal["cached", "resident"] | None = None
    """`cached` scores each sequence once, before training; `resident` keeps the reference in memory and scores each
    step. Default: `cached`, unless the reference moves or whole distributions are compared with its own."""
    every: PositiveInt | None = None
    """Move the reference towards the policy every so many steps (TR-DPO, arXiv:2404.09656)."""
    mix: Annotated[float, Field(gt=0, le=1)] | None = None
    """The policy's share when the reference moves."""
    store: UserPath | None = None
    """Folder that keeps cached values; runs may share it. Default: the run's own."""

    @model_validator(mode="after")
    def _moving_is_whole(self) -> ReferenceConfig:
        if (self.every is None) != (self.mix is None):
            raise ValueError("a moving reference needs both `every` and `mix`")
        if self.every is not None and self.mode is not None:
            raise ValueError("a moving reference is always in memory: leave `mode` out")
        return self


class CriticConfig(Section):
    """The model that values states, with weights of its own. Without this section values come from a head on the
    policy."""

    path: UserPath
    """The folder of a causal language model or of a reward model, whose score head is then where the values start."""
    lr: PositiveFloat | None = None
    """Its peak learning rate; it follows the schedule of `optim`. Default: `optim.lr`."""


class RolloutConfig(Section):
    """What is drawn while training, and what happens to draws that cannot be used."""

    n: PositiveInt | None = None
    """Replies for each prompt, for a method that learns from rows: the best and the worst become a pair, for example.
    Methods that sample by themselves say how many they want."""
    on_missing: Literal["abort", "retry", "drop_sample", "drop_group"] = "abort"
    """What to do when a reply could not be scored: end the run, ask again and then end it, leave out the reply, or
    leave out all replies to its prompt. What is left out is counted as `reward/missing`."""
    retries: PositiveInt = 3
    """How often `retry` asks again."""
    overlap: PositiveInt | None = None
    """Prompts whose replies are scored together while those to others are still drawn: for rewards that are waited for.
    Default: all at once, when everything is drawn."""
    redraws: NonNegativeInt = 3
    """How often prompts whose replies the method does not keep are replaced by others in the same step."""
    reuse_bytes: NonNegativeInt = 0
    """How many bytes of what drawing computes may be kept for the first update of the step, which then needs no product
    that is known already: about 4 bytes for each output of a linear layer and token. On a CPU, in float32."""
    compile: bool = False
    """Whether the steps of drawing are compiled: that takes half a minute or more when a model is first drawn from, and
    a C++ compiler; a step then takes 30 to 50 percent less. On a CPU, in float32, with the attention `sdpa`."""


class EvalConfig(Section):
    """Evaluation on held-out rows while training."""

    every: PositiveInt
    """Evaluate after every so many steps, and at the end."""
    data: DataConfig | None = None
    """Held-out rows. Default: a share of the training rows, which is then not trained on."""
    holdout: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """That share."""
    rows: PositiveInt = 256
    """The most held-out rows to use."""
    samples: NonNegativeInt = 0
    """Prompts to sample a reply for, written to `samples.jsonl`; they also give `kl/sequence`."""
    tasks: tuple[Task, ...] = ()
    """Further measurements."""
    metric: str | None = None
    """The metric that decides what is best. Default: `loss/total`, or `reward/mean` of the samples when the run samples
    while it trains."""
    goal: Literal["min", "max"] | None = None
    """Whether a smaller or a larger value of it is better. Default: smaller for a loss, larger for anything else."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a better value."""
    keep_best: bool = False
    """Export the best evaluated model instead of the last one."""

    def better(self, metric: str, value: float, best: float) -> bool:
        """Whether `value` of `metric` is better than `best`."""
        smaller = (self.goal or ("min" if metric.startswith("loss/") else "max")) == "min"
        return value < best if smaller else value > best

    @model_validator(mode="after")
    def _nothing_is_mixed_in(self) -> EvalConfig:
        if self.data is not None and self.data.mix is not None:
            raise ValueError("held-out rows are evaluated as they are: leave `mix` out")
        return self


class CheckpointConfig(Section):
    """Checkpoints to resume from."""

    every: PositiveInt = 100
    """Save after every so many steps; the last step is always saved."""
    keep: PositiveInt = 2
    """How many to keep, beside the best."""


class RunSection(Section):
    """The run itself."""

    dir: RunDir
    """The folder everything is written to."""
    seed: NonNegativeInt = 0
    """Every random choice derives from it."""
    epochs: PositiveFloat | None = None
    """Passes over the data (default 1)."""
    steps: PositiveInt | None = None
    """Steps, instead of epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: PositiveInt | None = None
    """CPU threads; part of what makes two runs equal bit for bit."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save."""

    @model_validator(mode="after")
    def _one_length(self) -> RunSection:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        return self


class PluginsConfig(Section):
    """Which plugins may load."""

    allow: tuple[str, ...] | None = None
    """Distribution names; the core's own components are always there."""


class RunConfig(Section):
    """One training run."""

    prefopt: Literal[1]
    """The version of this format."""
    model: ModelConfig
    data: DataConfig
    algorithm: Algorithm
    """The method, by name, with its hyperparameters."""
    optim: OptimConfig = OptimConfig()
    reference: ReferenceConfig | None = None
    critic: CriticConfig | None = None
    reward: RewardSource | None = None
    """What scores the replies of a method that samples while it trains."""
    rollout: RolloutConfig = RolloutConfig()
    eval: EvalConfig | None = None
    sampler: Sampler | None = None
    """How to draw completions. Default: `continuous`."""
    run: RunSection
    plugins: PluginsConfig = PluginsConfig()

    @property
    def draws(self) -> tuple[Draw, ...]:
        """What is drawn for each prompt in a step; empty for a run that learns from its rows alone."""
        own = self.algorithm.needs().draws
        return own or ((Draw(self.rollout.n),) if self.rollout.n is not None else ())


class SuiteConfig(Section):
    """A comparison: runs that differ in a few settings, repeated over seeds. A cell is one method x seed x setting."""

    prefopt: Literal[1]
    """The version of this format."""
    name: Name
    """The name of the suite."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    """A seed redraws data, annotators, initialisation and sampling."""
    stages: dict[Name, dict[str, Any]] = {}
    """Runs that cells share, each trained once per seed; a run refers to one as `stage:NAME`."""
    baseline: Name
    """The stage that cells are compared with. What it costs is not counted."""
    base: dict[str, Any]
    """The run that every cell starts from."""
    methods: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    """What each method changes in it: `label`, then sections of a run; `stage: NAME` evaluates a stage as it is;
    `best_of: 16` answers with the best of 16 replies of the baseline, by the reward model the cell trained."""
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Settings to vary, as dotted keys with lists; every method runs in every combination."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    """What to measure."""
    sampler: Sampler | None = None
    """How completions are drawn for the measurements."""
    prompts: PositiveInt = 128
    """Held-out prompts to sample replies for."""
    held_out: DataConfig
    """Where those come from."""
    workers: PositiveInt | None = None
    """Processes. Default: one for each CPU core."""
    plugins: PluginsConfig = PluginsConfig()
