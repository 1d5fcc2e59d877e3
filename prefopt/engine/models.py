"""Loads, builds and saves models. The only module that calls `from_pretrained` for weights; code that came with a model
never runs unless the configuration says so, and weights are read from safetensors alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer as RawTokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from prefopt.components import Recipe
from prefopt.config import ModelConfig
from prefopt.data.render import Tokenizer, load_tokenizer
from prefopt.data.streams import derive
from prefopt.engine import lora
from prefopt.engine.arena import arena
from prefopt.engine.forward import Scorer
from prefopt.engine.recall import Recall
from prefopt.engine.remembering import remembered
from prefopt.errors import ConfigError, ResourceError
from prefopt.sampling import Arena

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

PAD = "<|pad|>"
HEAD = "score.weight"
TRAIN_ONE = "Train one with algorithm reward_model, or name a sequence classifier."


@dataclass(frozen=True)
class Model:
    """A network with its tokenizer, on a device: what samplers and evaluations see. `warn` hears once when it cannot be
    sampled from fast."""

    network: nn.Module
    tokenizer: Tokenizer
    device: torch.device
    warn: Callable[[str], None] = print
    recall: Recall | None = None
    """Keeps what drawing computes, where it is to be reused."""
    compiled: bool = False
    """Whether steps of drawing are compiled where that is possible."""

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a completion."""
        configured = getattr(self.network.generation_config, "eos_token_id", None) or []
        listed = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*listed, self.tokenizer.eos_token_id) if i is not None)

    @property
    def positions(self) -> int | None:
        """The most tokens the network can read."""
        return positions(self.network.config)

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def export(self, folder: Path) -> None:
        network: Any = self.network
        network.save_pretrained(folder, state_dict=lora.merged(network) if lora.adapted(network) else None)
        self.tokenizer.save_pretrained(folder)

    def arena(self, slots: int, prompt: int, room: int, whole: int | None = None) -> Arena:
        found = arena(self.network, slots, prompt, room, whole, self.warn, self.compiled)
        return remembered(found, self.recall, slots)


def load_causal(config: ModelConfig, seed: int = 0) -> nn.Module:
    """The causal language model at `config.path`, in float32, with its adapters if it has any; new ones are drawn from
    `seed`."""
    network, report = _load(AutoModelForCausalLM.from_pretrained, config)
    _refuse_incomplete(config, report)
    if config.lora is not None:
        lora.attach(network, config.lora, seed)
    return network  # type: ignore[no-any-return]


def load_classifier(config: ModelConfig, tokenizer: Tokenizer, seed: int | None) -> nn.Module:
    """A one-score sequence classifier at `config.path`, or one built on a causal model, its head drawn from `seed`;
    without a seed the model must be a classifier.

    The padding token is made distinct from the end of sequence: transformers reads the score at the last token that is
    not padding. The head starts as N(0, 1/(h+1)) (Huang et al. 2024, arXiv:2403.17031).
    """
    network, report = _load(AutoModelForSequenceClassification.from_pretrained, config, num_labels=1)
    fresh = not _is_classifier(network)
    if fresh and seed is None:
        made = ", ".join(network.config.architectures or ["unknown"])
        raise ConfigError(f"`{config.path}` is no reward model: its architecture is {made}", fix=TRAIN_ONE)
    if fresh and set(report["missing_keys"]) - {HEAD}:  # tied weights may be stored under the name of the other head
        causal: Any = load_causal(config.model_copy(update={"lora": None}))
        network.base_model.load_state_dict(causal.base_model.state_dict())
    else:
        _refuse_incomplete(config, report, {HEAD} if fresh else ())
    _separate_padding(network, tokenizer)
    if fresh:
        with torch.no_grad():
            noise = torch.randn(network.score.weight.shape, generator=_generator(seed or 0, "score head"))
            network.score.weight.copy_(noise / (noise.shape[1] + 1) ** 0.5)
    if config.lora is not None:
        lora.attach(network, config.lora, seed or 0, whole=("score",))
    return network  # type: ignore[no-any-return]


def load_critic(path: str, tokenizer: Tokenizer, seed: int) -> tuple[Scorer, Tokenizer]:
    """The model at `path` as a sequence classifier whose score, before each token, is that state's value, and its own
    tokenizer. Raises `ConfigError` when it does not read the tokens of the policy's `tokenizer`."""
    own = load_tokenizer(path)
    vocabulary = own.get_vocab()
    if any(vocabulary.get(token) != number for token, number in tokenizer.get_vocab().items()):
        raise ConfigError(f"the critic `{path}` has another vocabulary than the model", where="critic.path")
    return Scorer(load_classifier(ModelConfig(path=path), own, seed)), own


def _is_classifier(network: Any) -> bool:
    """Whether the weights it was loaded from have a score head."""
    return any("ForSequenceClassification" in name for name in network.config.architectures or ())


def _separate_padding(network: Any, tokenizer: Tokenizer) -> None:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > network.config.get_text_config().vocab_size:
            network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            with torch.no_grad():
                network.get_input_embeddings().weight[tokenizer.pad_token_id].zero_()
    network.config.pad_token_id = tokenizer.pad_token_id


def _load(load: Callable[..., Any], config: ModelConfig, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """A network, and what transformers reports about the weights it read."""
    with _explained(config.path):
        network, report = load(
            config.path,
            dtype=torch.float32,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with the name of the weight
            **options,
        )
    return network.eval(), report


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what transformers raises for a model it cannot read into an error with advice."""
    try:
        yield
    except SafetensorError as error:
        fix = "Copy or download the model again."
        raise ResourceError(f"the weights of `{path}` are damaged: {error}", where="model.path", fix=fix) from None
    except (OSError, ValueError) as error:
        what = str(error).partition("\n")[0]
        raise ConfigError(f"the model `{path}` cannot be loaded: {what}", where="model.path") from None


def _refuse_incomplete(config: ModelConfig, report: Mapping[str, Any], allowed: Collection[str] = ()) -> None:
    """Weights that are missing or do not fit would be drawn at random, in silence."""
    problems = [
        f"the weight {name} has shape {list(found)}, but config.json asks for {list(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    missing = sorted(set(report["missing_keys"]) - set(allowed))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems.append(f"the weights have no {', '.join(missing[:3])}{more}")
    if problems:
        raise ConfigError(*(f"the model `{config.path}` is incomplete: {p}" for p in problems[:3]), where="model.path")


def _generator(*names: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*names))


def positions(config: Any) -> int | None:
    """The most tokens a model with this transformers configuration can read; None when it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def reader(model: ModelConfig, recipe: Recipe | None) -> tuple[Tokenizer, int | None]:
    """The tokenizer of a model and the most tokens it can read, without its weights."""
    if recipe is not None:
        return recipe_tokenizer(recipe), positions(AutoConfig.for_model(**recipe.config))
    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    with _explained(model.path):
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    return tokenizer, positions(config)


def recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of a base model."""
    raw = RawTokenizer.from_str(json.dumps(recipe.tokenizer))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **recipe.special_tokens)


def build(recipe: Recipe, folder: Path, seed: int) -> None:
    """Writes an untrained model, its weights drawn from `seed`, and its tokenizer to `folder`: all of it or nothing."""
    tokenizer = recipe_tokenizer(recipe)
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in recipe.special_tokens}
    settings = {"bos_token_id": None, **recipe.config, "vocab_size": len(tokenizer), **ids}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "base model"))
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def save(scorer: Scorer, tokenizer: Tokenizer, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Writes a model that `from_pretrained` loads; a value head goes into a file of its own. Adapters are merged into
    it, and written by themselves to `adapter` beside it."""
    network: Any = scorer.network
    if lora.adapted(network):
        if state is not None:
            scorer.load_state_dict(state, strict=False)
        lora.save(network, folder.with_name("adapter"))
        state = {f"network.{name}": x for name, x in lora.merged(network).items()}
        state |= {name: x for name, x in scorer.state_dict().items() if name.startswith("value_head.")}
    state = scorer.state_dict() if state is None else state
    own = {name.removeprefix("network."): x for name, x in state.items() if name.startswith("network.")}
    network.save_pretrained(folder, state_dict=own)
    tokenizer.save_pretrained(folder)
    head = {name: x for name, x in state.items() if name.startswith("value_head.")}
    if head:
        save_file(head, folder / "value_head.safetensors")


def open_model(model: ModelConfig | str, device: torch.device, warn: Callable[[str], None] = print) -> Model:
    """A saved causal model, by its settings or its path, for sampling and scoring."""
    config = ModelConfig(path=model) if isinstance(model, str) else model
    return Model(load_causal(config).to(device), load_tokenizer(config.path, config.trust_remote_code), device, warn)
