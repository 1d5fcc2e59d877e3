"""What can be known to be wrong before anything heavy is loaded: no torch, so `prefopt validate` is quick."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from prefopt.batch import Draw, Needs
from prefopt.components import Algorithm, Component, Recipe, Sampler, Scorer, TextModel, World, expanded
from prefopt.config import DataConfig, RunConfig, located, read_document
from prefopt.config.constitution import read_constitution
from prefopt.config.making import LabelConfig, Making, SampleConfig
from prefopt.config.models import MixConfig, RowsConfig
from prefopt.config.yaml import Keys
from prefopt.data.adapt import adapt, require
from prefopt.data.check import Policy, place, screened
from prefopt.data.source import verdict
from prefopt.data.streams import generator
from prefopt.errors import ConfigError, DataError, PluginError, PrefoptError, Problem
from prefopt.registry import Registry
from prefopt.rows import Comparison, Demonstration, Prompt, Ranking, Row

if TYPE_CHECKING:
    import numpy as np

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WORLD = "world:"
MOST_SIBLINGS = 50

Promised = Mapping[str, type[Row] | None]
"""What earlier stages will have made: folders of models, and files of rows with the kind of these."""


@dataclass(frozen=True)
class _Light:
    """Services before any model exists: random numbers only."""

    seed: int

    def rng(self, *purpose: str | int) -> np.random.Generator:
        return generator(self.seed, "component", *purpose)

    def scorer(self, path: str) -> Scorer:
        raise _unloaded("reward model", path)

    def language_model(self, path: str) -> TextModel:
        raise _unloaded("model", path)

    def kept(self, name: str) -> None:
        return None


def _unloaded(what: str, path: str) -> ConfigError:
    return ConfigError(f"the {what} at `{path}` is not loaded while a configuration is checked")


def check(
    config: RunConfig | Making,
    registry: Registry,
    promised: Promised = MappingProxyType({}),
    where: Callable[[Keys], str] | None = None,
    beside: Path | None = None,
) -> None:
    """Raises everything that is wrong with a stage and can be seen without a model: one error, of the gravest kind.

    `promised` is what will exist when the stage starts; `where` gives the place of a key in the document
    the run was read from, `beside` the folder with other runs, one of which may make a model that is missing.
    """
    found = _errors if isinstance(config, RunConfig) else _making_errors
    errors = list(found(config, registry, promised, beside))  # type: ignore[arg-type]
    if errors:
        gravest = min(errors, key=lambda error: error.exit_code)
        PrefoptError.__init__(gravest, *(problem for error in errors for problem in error.problems))
        raise gravest if where is None else located(gravest, where)


def _errors(config: RunConfig, registry: Registry, promised: Promised, beside: Path | None) -> Iterator[PrefoptError]:
    paths = {"model.path": config.model.path, "reference.path": config.reference.path if config.reference else None}
    paths["critic.path"] = config.critic.path if config.critic else None
    for where, path in paths.items():
        if path is not None and path not in promised:
            yield from _caught(partial(_check_model, path, where, registry, beside))
    yield from _caught(partial(_check_lora, config))
    yield from _caught(partial(_check_algorithm, config))
    yield from _caught(partial(_check_sampling, config))
    yield from _caught(partial(_check_critic, config))
    yield from _caught(partial(_check_data, config.data, "data", config, promised), "data")
    if config.eval is not None and config.eval.data is not None:
        yield from _caught(partial(_check_data, config.eval.data, "eval.data", config, promised), "eval.data")
    if config.data.mix is not None:
        yield from _caught(partial(_check_mix, config.data.mix, config, promised), "data.mix")


def _making_errors(
    config: Making, registry: Registry, promised: Promised, beside: Path | None
) -> Iterator[PrefoptError]:
    if not isinstance(config, LabelConfig) or config.n is not None:
        yield from _caught(partial(_check_drawing, config, registry, promised, beside))
    wanted = _brought(config)
    yield from _caught(partial(_first_as, config.data, "data", config.run.seed, promised, wanted), "data")
    if not isinstance(config, SampleConfig) and config.constitution is not None:
        yield from _caught(partial(_check_constitution, config.constitution, isinstance(config, LabelConfig)))
        if isinstance(config, LabelConfig) and not config.judge.reads_principles:
            what = f"judge `{config.judge.name}` does not read principles: it would judge as if there were none"
            yield ConfigError(what, where="judge", fix="Leave `constitution` out, or choose a judge that reads them.")


def _brought(config: Making) -> type[Row]:
    """What the rows of a stage have to bring."""
    if isinstance(config, SampleConfig) and config.self_play:
        return Demonstration
    return Comparison if isinstance(config, LabelConfig) and config.n is None else Prompt


def _check_constitution(path: str, compare: bool) -> None:
    read_constitution(path, compare)


def _check_drawing(config: Making, registry: Registry, promised: Promised, beside: Path | None) -> None:
    """A stage that draws replies has a trained model to draw them from."""
    path = None if config.model is None else config.model.path
    if path is None or path.startswith(WORLD):
        what = "replies are drawn, and there is no model" if path is None else f"`{path}` has learned nothing yet"
        raise ConfigError(what, where="model", fix="Name a stage that trains, or the folder of a model.")
    if config.model is not None and config.model.embedding_noise is not None:
        raise ConfigError("noise is for what is trained on", where="model.embedding_noise", fix="Leave it out.")
    if path not in promised:
        _check_model(path, "model.path", registry, beside)


def _first_as(data: RowsConfig, where: str, seed: int, promised: Promised, wanted: type[Row]) -> None:
    """The first row can become what is wanted."""
    if not _yet_to_make(data, promised, wanted):
        adapt(_peek(data, seed, where)[:1], wanted)


def _yet_to_make(data: RowsConfig, promised: Promised, wanted: type[Row]) -> bool:
    """Whether an earlier stage will make these rows. Raises `DataError` when they cannot become what is wanted."""
    kinds = [kind for name in data.source.files if (kind := promised.get(name)) is not None]
    for kind in kinds:
        require(kind, wanted)
    return bool(kinds)


def promise(config: RunConfig | Making, promised: Promised) -> type[Row] | None:
    """The kind of rows that a stage, which is checked, will make; None where it trains a model."""
    if isinstance(config, RunConfig):
        return None
    if not isinstance(config, LabelConfig) or config.n is not None:
        return config.makes
    kinds = [promised[name] for name in config.data.source.files if name in promised]
    if kinds:
        return kinds[0]
    first = _peek(config.data, config.run.seed, "data")
    return Ranking if any(isinstance(row, Ranking) and len(row.completions) > 2 for row in first) else Comparison


def _caught(check: Callable[[], None], where: str = "") -> Iterator[PrefoptError]:
    """The error of a check; problems that do not say where are those of the section `where`."""
    try:
        check()
    except PrefoptError as error:
        PrefoptError.__init__(error, *(replace(p, where=p.where or where) for p in error.problems))
        yield error


def _check_model(path: str, where: str, registry: Registry, beside: Path | None) -> None:
    """A local model must have a configuration and safetensors; a hub name cannot be checked without the network."""
    if path.startswith(WORLD) and where != "model.path":
        fix = "Leave it out when the reference is the model as it starts; otherwise name a model folder."
        raise ConfigError(f"`{path}` is built by the run that trains it", where=where, fix=fix)
    if path.startswith(WORLD):
        registry.find("world", path.removeprefix(WORLD))
        return
    folder = Path(path)
    if not folder.exists():
        if HUB_NAME.fullmatch(path) and not folder.parent.exists():
            return
        raise ConfigError(f"there is no folder `{path}`", where=where, fix=_maker(folder, beside))
    if not (folder / "config.json").is_file():
        raise ConfigError(f"`{path}` has no config.json", where=where, fix="Name a Hugging Face model folder.")
    if not list(folder.glob("*.safetensors")):
        others = ", ".join(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        fix = f"Convert {others} to safetensors: prefopt never loads pickled weights." if others else ""
        raise ConfigError(f"`{path}` has no safetensors weights", where=where, fix=fix)


def _check_lora(config: RunConfig) -> None:
    if config.model.lora is None:
        return
    if find_spec("peft") is None:
        fix = "pip install 'prefopt[lora]'"
        raise ConfigError("adapters need peft, which is not installed", where="model.lora", fix=fix)
    if config.reference is not None and config.reference.every is not None:
        raise ConfigError(
            "a moving reference mixes weights, and adapters are products of two: their mix is none",
            where="reference.every",
            fix="Leave out reference.every and reference.mix, or model.lora.",
        )


def _maker(model: Path, beside: Path | None) -> str:
    """What to do for a model that is not there: a run's model is made by the run, whose configuration may be near."""
    if model.name != "model":
        return "Train or download the model first. A run writes its model to RUN_DIR/model."
    for path in sorted(beside.glob("*.yaml"))[:MOST_SIBLINGS] if beside is not None else ():
        with suppress(PrefoptError):
            made = read_document(path).at("run", "dir").data
            if isinstance(made, str) and Path(expanded(made)) == model.parent:
                return f"`prefopt train {path}` makes it."
    return f"Train it first: it is the model of the run in `{model.parent}`."


def _check_algorithm(config: RunConfig) -> None:
    needs = _needs(config.algorithm)
    if "scores" in needs.during and needs.during != {"scores"}:
        others = ", ".join(sorted(needs.during - {"scores"}))
        raise PluginError(
            f"algorithm `{config.algorithm.name}` asks for scores and for {others}: one model gives scores alone",
            where="algorithm",
        )
    if config.reference is not None and not needs.reference:
        raise ConfigError(f"algorithm `{config.algorithm.name}` uses no reference", where="reference", fix="Remove it.")
    kept = config.reference is not None and (config.reference.mode == "cached" or config.reference.store is not None)
    if kept and "token_kl" in needs.during:
        raise ConfigError(
            f"algorithm `{config.algorithm.name}` compares whole distributions with the reference's; none are kept",
            where="reference",
            fix="Set mode: resident, or leave mode and store out.",
        )


def _check_sampling(config: RunConfig) -> None:
    """A run that samples while it trains has a reward, a sampler that serves it, and a reference that stays at hand."""
    name, own = config.algorithm.name, _needs(config.algorithm).draws
    draws = config.draws
    problems: list[Problem] = []
    if own and config.rollout.n is not None:
        what = f"algorithm `{name}` says itself how many replies it draws"
        problems.append(Problem(what, "rollout.n", "Leave it out."))
    if not draws and "sampled_logps" in _needs(config.algorithm).columns:
        what = f"algorithm `{name}` asks for what a sampler says of its draws, and draws nothing"
        problems.append(Problem(what, "algorithm", "Set rollout.n to draw replies for each prompt while training."))
    if draws and config.reward is None:
        what = f"algorithm `{name}` learns from scored replies, and nothing scores them"
        problems.append(Problem(what, "reward", "Name one: `prefopt plugins list` shows what there is."))
    if not draws and config.reward is not None:
        fix = "Leave it out, or set rollout.n to draw replies for each prompt while training."
        problems.append(Problem(f"algorithm `{name}` learns from rows: no reply is scored", "reward", fix))
    if draws and config.algorithm.trains_reward:
        problems.append(Problem("a reward model draws no replies", "rollout.n", "Leave it out."))
    if draws and config.model.embedding_noise is not None:
        what = "with noise in training passes log-probabilities are not those that replies were sampled with"
        problems.append(Problem(what, "model.embedding_noise", "Leave it out where replies are drawn."))
    if config.sampler is not None:
        problems += _unserved(config.sampler, draws)
    kept = config.reference is not None and (config.reference.mode == "cached" or config.reference.store is not None)
    if draws and kept:
        what = "what is drawn while training cannot be scored before: the reference stays in memory"
        problems.append(Problem(what, "reference", "Leave mode and store out."))
    if problems:
        raise ConfigError(*problems)


def _unserved(sampler: Sampler, draws: tuple[Draw, ...]) -> Iterator[Problem]:
    """Draws a sampler cannot make, or whose log-probabilities are not those of the policy."""
    for draw in draws:
        if not sampler.serves(draw):
            asked = f"greedy draws from the {draw.source}" if draw.greedy else f"draws from the {draw.source}"
            yield Problem(f"sampler `{sampler.name}` cannot make {asked}", "sampler", "Choose another.")
    if draws and sampler.density is None:
        yield Problem(
            "with these settings replies come from another distribution than the policy's: ratios and KL divergence "
            "would be wrong",
            "sampler",
            "Train without greedy draws and without cutting the distribution (top-k, top-p, min-p).",
        )


def _check_critic(config: RunConfig) -> None:
    needs = _needs(config.algorithm)
    if config.critic is not None and "values" not in needs.during:
        raise ConfigError(f"algorithm `{config.algorithm.name}` uses no values", where="critic", fix="Remove it.")


def _needs(algorithm: Algorithm) -> Needs:
    try:
        return algorithm.needs()
    except PrefoptError:
        raise
    except Exception as error:
        raise PluginError(
            f"{type(algorithm).__name__}.needs() failed: {type(error).__name__}: {error}", where="algorithm"
        ) from None


def _check_data(data: DataConfig, where: str, config: RunConfig, promised: Promised) -> None:
    """The first rows can be read, become what the algorithm eats, and have the numbers it asks for."""
    needed, wanted = _needs(config.algorithm).rows, Prompt if config.draws else config.algorithm.eats
    if _yet_to_make(data, promised, wanted):
        return
    rows = _peek(data, config.run.seed, where)
    adapt(rows[:1], wanted)
    if config.draws:
        return
    problems = []
    for i, row in enumerate(rows):
        for sequence in (s for new in adapt([row], wanted) for s in new.sequences(0)):
            missing = sorted(needed - sequence.fields.keys())
            if missing:
                what = f"algorithm `{config.algorithm.name}` needs `{', '.join(missing)}`, which this row does not have"
                problems.append(Problem(what, f"{where}, {place(rows, i)}"))
                break
    if problems and data.on_bad_row == "stop":
        raise DataError(*problems[:5])


def _check_mix(data: MixConfig, config: RunConfig, promised: Promised) -> None:
    if config.algorithm.trains_reward:
        raise ConfigError("a reward model has no likelihood to mix in", where="data.mix", fix="Leave it out.")
    _first_as(data, "data.mix", config.run.seed, promised, Demonstration)


def _peek(data: RowsConfig, seed: int, where: str) -> Sequence[Row]:
    """The first rows; bad ones are an error, or left out where they may be dropped."""
    rows = data.source.peek(_Light(seed))
    if not len(rows):
        raise DataError("the data source has no rows", where=where)
    return screened(rows, Policy(data.on_bad_row == "drop", len(rows)))[0]


def world_recipe(path: str, find: Callable[[str, str], type[Component]]) -> Recipe | None:
    """The base model of the world that `path` names; None when it names none."""
    if not path.startswith(WORLD):
        return None
    world = find("world", path.removeprefix(WORLD))()
    assert isinstance(world, World)
    return world.recipe()


def describe(config: RunConfig | Making, registry: Registry) -> str:
    """One line that says what a valid configuration will do."""
    if not isinstance(config, RunConfig):
        return f"{config.kind}: makes {config.makes.kind} rows from those of {config.data.source.name}"
    entry = registry.owner(type(config.algorithm))
    needs = config.algorithm.needs()
    parts = [f"{config.algorithm.name} ({entry.distribution} {entry.version})"]
    kind = Prompt.kind if config.draws else config.algorithm.eats.kind
    parts.append(f"on {kind} rows from {config.data.source.name}")
    parts.append(f"needs {', '.join([*sorted(needs.columns), *sorted(needs.during)])}")
    return ", ".join(parts)


def _sections(config: RunConfig) -> dict[str, RowsConfig]:
    sections: dict[str, RowsConfig | None] = {"data": config.data, "data.mix": config.data.mix}
    sections["eval.data"] = config.eval.data if config.eval is not None else None
    return {where: section for where, section in sections.items() if section is not None}


def verdicts(config: RunConfig) -> Iterator[str]:
    """What the rows of each source were taken for, as far as its first rows tell."""
    for where, section in _sections(config).items():
        yield f"{where}: {verdict(section.source.peek(_Light(config.run.seed)))}"


def opened(config: RunConfig) -> dict[str, Sequence[Row]]:
    """All rows of each source, by the section that names it, without a model."""
    return {where: s.source.open(_Light(config.run.seed)) for where, s in _sections(config).items()}
