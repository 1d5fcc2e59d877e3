"""Components: what a plugin can contribute. Each is a frozen pydantic model whose fields are its settings.

A component declares and computes; it never loads a model, opens a file of the run or knows about ranks. The only
door to models and random numbers is the `Services` object that `open` receives.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Protocol, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PositiveInt,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from prefopt.batch import Batch, Draw, Loss, Needs, Policy, StepContext
from prefopt.errors import PluginError
from prefopt.rows import Comparison, Rollout, Row, Sequence, Text
from prefopt.sampling import Drawer, LanguageModel
from prefopt.verdicts import Comparer, Pair, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor


DATA = "$PREFOPT_DATA"


def expanded(path: str) -> str:
    """`path` with `~` replaced by the home folder, and `$PREFOPT_DATA` at its beginning by that variable (`../shared`
    when it is not set)."""
    if path == DATA or path.startswith(f"{DATA}/"):
        return os.environ.get("PREFOPT_DATA", "../shared") + path.removeprefix(DATA)
    return os.path.expanduser(path)


class _NoPart:
    """Marks a path whose content no result depends on."""


UserPath = Annotated[str, AfterValidator(expanded)]
"""A path as a user writes it. It is stored without `~`, and a run folder keeps it as an absolute path. What results are
made of includes the file that it names."""
NO_PART: Final = _NoPart()
ToolPath = Annotated[UserPath, NO_PART]
"""The same for a file whose content changes no result: a cache, a program."""


def _resolve(cls: type[Component], value: Any, info: ValidationInfo) -> Component:
    """The component a configuration section names. `info.context["find"]` maps (kind, name) to a class.

    Raises one error that carries all of the section's errors (`ctx["errors"]`) and its class, for the reader of the
    file.
    """
    if isinstance(value, cls):
        return value
    if isinstance(value, str):
        value = {cls.key: value}
    if not isinstance(value, Mapping) or not isinstance(value.get(cls.key), str):
        raise PydanticCustomError("component_name", f"write the {cls.kind} as {cls.key}: NAME")
    found = info.context["find"](cls.kind, value[cls.key]) if info.context else None
    if found is None:
        raise PydanticCustomError("component_name", f"no {cls.kind} can be looked up here")
    settings = {k: v for k, v in value.items() if k != cls.key}
    try:
        component: Component = found.model_validate_json(json.dumps(settings), strict=True, context=info.context)
    except ValidationError as error:
        raise PydanticCustomError("component", "invalid", {"errors": error.errors(), "cls": found}) from None
    if ":" in value[cls.key]:
        component._written = value[cls.key]
    return component


def _holds_tuple(annotation: Any) -> bool:
    """Whether a field is a tuple, or may be one."""
    return get_origin(annotation) is tuple or any(_holds_tuple(part) for part in get_args(annotation))


class Component(BaseModel):
    """A named, configurable part. Subclasses set `name`; their fields become keys of the configuration section.

    A field annotated with a kind (`reward: RewardSource`) accepts any component of that kind by its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    kind: ClassVar[str] = "component"
    key: ClassVar[str] = "name"
    """The configuration key that holds the component's name."""
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    _written: str = PrivateAttr("")
    """`distribution:name`, where the configuration says which of two plugins it means."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if not cls.name:
            _read_annotations(cls)

    @property
    def files(self) -> tuple[str, ...]:
        """The local files it reads, beside those that fields of type `UserPath` name: their hashes are recorded with
        what is made of them."""
        return ()

    @classmethod
    def summary(cls) -> str:
        """The first paragraph of the docstring."""
        return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.key: self._written or self.name, **handler(self)}

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        """Without the name, and with lists as tuples where tuples are wanted: JSON knows lists alone."""
        if not isinstance(value, Mapping):
            return value
        named = bool(cls.name) and str(value.get(cls.key)).rpartition(":")[2] == cls.name
        wanted = {name for name, field in cls.model_fields.items() if _holds_tuple(field.annotation)}
        given = {k: v for k, v in value.items() if not (named and k == cls.key)}
        return {k: tuple(v) if k in wanted and isinstance(v, list) else v for k, v in given.items()}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if cls.name:
            return handler(source)
        by_name = core_schema.plain_serializer_function_ser_schema(lambda component: component.model_dump())
        return core_schema.with_info_plain_validator_function(partial(_resolve, cls), serialization=by_name)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) if cls.name else {"x-component": cls.kind}


def _read_annotations(cls: type[BaseModel]) -> None:
    """Reads the annotations of a base once, and leaves those of its settings: pydantic would compile the text of all
    again for each class built on it."""
    with suppress(NameError):
        read = inspect.get_annotations(cls, eval_str=True)
        cls.__annotations__ = {name: hint for name, hint in read.items() if name not in cls.__class_vars__}


_read_annotations(Component)


class Services(Protocol):
    """What a component other than an algorithm may ask the engine for when it is opened."""

    def rng(self, *purpose: str | int) -> np.random.Generator:
        """A random generator that depends on the run's seed and `purpose` alone."""

    def scorer(self, path: str) -> Scorer:
        """The reward model saved at `path`."""

    def language_model(self, path: str) -> TextModel:
        """The language model at `path`, to ask for the probabilities of a few words."""

    def kept(self, name: str) -> Path | None:
        """A file in the run's folder for what is costly to ask for again; None where there is no folder."""


class TextModel(Protocol):
    """A language model that reads text. Control tokens that stand in a text are read as plain text."""

    @property
    def chat(self) -> bool:
        """Whether it has a chat template."""

    @property
    def identity(self) -> str:
        """A hash of its configuration and weights."""

    def logps(self, prompts: List[Text], endings: List[str]) -> list[list[float]]:
        """The log-probability of each ending after each prompt, in nats. Raises `DataError` for a prompt that is too
        long."""


# --- algorithms -----------------------------------------------------------------------------------------------------


class Algorithm(Component):
    """A preference-optimization method: what it needs, and a loss.

    Set `name`, `eats` (the row kind it learns from) and `paper`; write `needs` and `loss`. `formula`, `dialect` and
    `differences` (known differences from other implementations) are printed by `prefopt explain`.
    """

    kind: ClassVar[str] = "algorithm"
    eats: ClassVar[type[Row]] = Comparison
    formula: ClassVar[str] = ""
    dialect: ClassVar[str] = ""
    differences: ClassVar[tuple[str, ...]] = ()
    coupled: ClassVar[bool] = False
    """True when the loss couples a whole minibatch (a sort, say), so that it must see it in one piece."""
    moves: ClassVar[tuple[int | None, int | None]] = (1, -1)
    """What a step does, where the policy is the reference, to better and to worse completions: 1 makes them more
    likely, -1 less, 0 neither, None what depends on the numbers."""
    act_elsewhere: ClassVar[frozenset[str]] = frozenset()
    """Settings that change neither batch nor loss, but what `accept` says, for example."""

    def needs(self) -> Needs:
        """What the engine has to compute. Called once, before any tensor exists."""
        return Needs()

    def loss_at_init(self) -> float | None:
        """The loss where the policy is the reference, in closed form; None where it has none."""
        return None

    def arrange(self, rows: List[Row]) -> list[Sequence]:
        """The sequences to score for the rows of one global step. A group is numbered by its row's place in `rows`."""
        return [sequence for group, row in enumerate(rows) for sequence in row.sequences(group)]

    def prepare(self, batch: Batch, ctx: StepContext) -> Batch:
        """Columns that need the whole global step (means, sorts, advantages). No gradient; default: unchanged."""
        return batch

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        """The loss of one microbatch: pure, and built from `batch.mean` so that any split gives the same sum."""
        raise NotImplementedError(f"algorithm `{self.name}` has no loss yet: write {type(self).__name__}.loss")

    def accept(self, metrics: Mapping[str, float]) -> str:
        """`step` to update, `skip` to drop this minibatch's gradient, `stop` to drop it and what is left of the step.
        Called before each update."""
        return "step"

    @property
    def passes(self) -> tuple[int, int]:
        """How often a step is passed over, and in how many updates each time."""
        return 1, 1

    @property
    def trains_reward(self) -> bool:
        """Whether the result is a reward model instead of a policy: it asks for scores and for nothing else."""
        return self.needs().during == {"scores"}


class RolloutAlgorithm(Algorithm):
    """A method that learns from samples drawn as it trains: `needs().draws` says which. One step draws and prepares
    once; it is then passed over `inner_epochs` times in `minibatches`, each of them one update."""

    eats: ClassVar[type[Row]] = Rollout
    act_elsewhere: ClassVar[frozenset[str]] = frozenset({"inner_epochs", "minibatches"})

    inner_epochs: PositiveInt = 1
    """Passes over the samples of a step."""
    minibatches: PositiveInt = 1
    """Updates in each pass; prompts are dealt to them at random."""

    @property
    def passes(self) -> tuple[int, int]:
        return self.inner_epochs, self.minibatches

    @property
    def on_policy(self) -> bool:
        """Whether every sample is used for one update only, by the policy that drew it: the ratio of old and new
        probabilities is then 1, and nobody has to compute the old ones."""
        return self.passes == (1, 1)

    def keep(self, group: Rollout) -> bool:
        """Whether a scored group is worth a step. What is not kept is replaced by other prompts, a few times."""
        return True

    def idle(self, batch: Batch) -> Tensor | None:
        """[N] True at sequences that neither loss nor gradient depend on, after `prepare`. They are left out of the
        passes and stay counted. None: there are none."""
        return None


# --- rewards and judges ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """A reward, or None with the `reason` it is missing; `parts` are its named summands, and numbers that explain
    it."""

    value: float | None
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


Scorer = Callable[[List[Rollout]], list[list[Score]]]


class RewardSource(Component):
    """Scores completions. It gets whole groups (one prompt, its completions, the row's extra columns)."""

    kind: ClassVar[str] = "reward"

    def open(self, services: Services) -> Scorer:
        """The function that scores; called once. Override it when a model or a random stream is needed."""
        return self.score

    def score(self, groups: List[Rollout]) -> list[list[Score]]:
        """One score for each completion of each group. A missing score is `Score(None, reason)`, never 0."""
        raise NotImplementedError(f"reward `{self.name}` must define score or open")


class Judge(Component):
    """Compares completions in pairs, and may rate them one by one."""

    kind: ClassVar[str] = "judge"

    @property
    def reads_principles(self) -> bool:
        """Whether it judges by the principle that was drawn for a pair, `principle_of(pair.extra)`. A judge that does
        not is refused where there is a constitution."""
        return False

    def open(self, services: Services) -> Comparer:
        """The function that compares; called once."""
        return self.compare

    def compare(self, pairs: List[Pair]) -> list[Verdict]:
        """One verdict for each pair, read in the order it is given. A missing one is `Verdict(None, reason=...)`."""
        raise NotImplementedError(f"judge `{self.name}` must define compare or open")

    def open_rating(self, services: Services) -> Scorer:
        """The function that rates single replies under the judge's rubric; called once. Default: `rate`."""
        return self.rate

    def rate(self, groups: List[Rollout]) -> list[list[Score]]:
        """One number for each completion of each group. A missing one is `Score(None, reason)`."""
        raise PluginError(f"judge `{self.name}` compares replies and does not rate them one by one")


# --- data and sampling ----------------------------------------------------------------------------------------------


class DataSource(Component):
    """Where rows come from."""

    kind: ClassVar[str] = "data source"
    key: ClassVar[str] = "source"

    def open(self, services: Services) -> List[Row]:
        """The rows, by index: a list, or a sequence that reads a row when it is asked for it and raises `DataError`
        when that row is bad. A source as a whole that cannot be read raises here."""
        raise NotImplementedError(f"data source `{self.name}` must define open")

    def peek(self, services: Services) -> List[Row]:
        """A few rows, quickly and without a model, for `prefopt validate`. Default: all of them."""
        return self.open(services)


class Sampler(Component):
    """Draws completions from a model."""

    kind: ClassVar[str] = "sampler"
    tells_own_logps: ClassVar[bool] = False
    """Whether draws come from the very model in training, in its own precision: their log-probabilities are then those
    that it gives them when it reads them, up to rounding, and nobody has to compute these again."""

    @property
    def density(self) -> float | None:
        """The temperature T when draws come from softmax(logits / T) and nothing else, None otherwise: without it no KL
        divergence is measured."""
        return None

    def serves(self, draw: Draw) -> bool:
        """Whether it can draw that: what it cannot is refused before a run starts. Default: samples of one model."""
        return draw.source != "mixture" and not draw.greedy

    @contextmanager
    def running(self, services: Services) -> Iterator[Sampler]:
        """This sampler for the time of a run; what it starts ends there. Entered once, before anything is drawn."""
        yield self

    def open(self, model: LanguageModel, other: LanguageModel | None = None, mix: float = 0.0) -> Drawer:
        """The function that draws. Its completions carry `ids` and `logps`, the latter of the distribution that was
        drawn from. With `other` that is the geometric mixture p(v) ~ model(v)^(1 - mix) other(v)^mix. Their order must
        not depend on time: with `rollout.overlap` it says which are scored together, and runs repeat themselves."""
        raise NotImplementedError(f"sampler `{self.name}` must define open")


# --- evaluation -----------------------------------------------------------------------------------------------------


class Subject(Protocol):
    """A trained model under evaluation, beside the model it is compared with."""

    rows: List[Row]

    def rollouts(self, n: int) -> list[Rollout]:
        """`n` completions of the model for each held-out prompt."""

    def baseline(self, n: int) -> list[Rollout]:
        """The same of the model it is compared with."""

    def log_ratios(self, rollouts: List[Rollout]) -> list[list[float]] | None:
        """log p(completion) under the model minus under the baseline, in nats; None where the model has no density."""

    def mean_logps(self, rollouts: List[Rollout]) -> list[list[float | None]] | None:
        """Mean log-probability of a token of each completion, in nats; None for one the model cannot read whole, and
        for all where the model has no density."""

    def kl_bound(self) -> float | None:
        """An upper bound on the KL divergence, in nats, where there is no density but a bound is known."""

    def scores(self, rollouts: List[Rollout]) -> list[list[float]] | None:
        """Scores of the reward model under evaluation; None when a policy is evaluated."""

    def reward(self, source: RewardSource) -> Scorer:
        """A reward source, opened."""

    def judge(self, judge: Judge) -> Comparer:
        """A judge, opened."""


class Task(Component):
    """Measures a trained model."""

    kind: ClassVar[str] = "task"

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        """Named measurements; a measurement that makes no sense for the subject is left out."""
        raise NotImplementedError(f"task `{self.name}` must define evaluate")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model to build from nothing: a transformers configuration (with `model_type`) and a `tokenizer.json`."""

    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    special_tokens: Mapping[str, str]


class World(Component):
    """A base model to begin experiments with. The rest of a world, its data source, gold reward and annotators, are
    components like any other, used by name."""

    kind: ClassVar[str] = "world"

    def recipe(self) -> Recipe:
        """The base model every run in this world starts from; its weights are drawn from the run's seed."""
        raise NotImplementedError(f"world `{self.name}` must define recipe")
