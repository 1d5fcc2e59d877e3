"""Low-rank adapters, through peft. The network keeps its class and its names: adapters are put into its layers.

Hu et al. 2021, arXiv:2106.09685. Dropout of adapters is off, always: policy and reference passes must agree. The only
module that imports peft, which is an extra of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefopt.config import LoraConfig
from prefopt.data.streams import derive
from prefopt.errors import ConfigError

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What peft puts before the names of an adapter's weights in a file."""
NAME = "default"
PLAIN = {"use_dora": False, "lora_bias": False, "bias": "none", "trainable_token_indices": None, "peft_type": "LORA"}
"""What an adapter's settings must say for it to be a sum of two products and nothing else."""


def attach(network: nn.Module, config: LoraConfig, seed: int, whole: tuple[str, ...] = ()) -> None:
    """Freezes the network and puts adapters into it, new ones or those at `config.path`. The modules named in `whole`
    are trained as they are.

    A new adapter changes nothing: its second matrix is 0. Raises `ConfigError` where an adapter does not fit.
    """
    import peft

    settings = _settings(config, peft, "SEQ_CLS" if whole else "CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), _explained(config):
        torch.manual_seed(derive(seed, "lora"))
        peft.inject_adapter_in_model(settings, network, adapter_name=NAME)
    _refuse_vocabulary(network)
    for name in whole:
        network.get_submodule(name).requires_grad_(True)
    if config.path is not None:
        _fill(network, Path(config.path), peft, whole)
    network.lora = settings


def adapted(network: nn.Module) -> bool:
    """Whether there are adapters in it."""
    return hasattr(network, "lora")


def _settings(config: LoraConfig, peft: Any, task: str) -> Any:
    """As the configuration has them, or as an adapter was saved with them."""
    if config.path is not None:
        with _explained(config):
            found = peft.LoraConfig.from_pretrained(config.path)
        strange = [name for name, plain in PLAIN.items() if getattr(found, name, plain) not in (plain, None)]
        if strange:
            raise ConfigError(f"the adapter is no plain LoRA: it has {', '.join(strange)}", where="model.lora.path")
        found.lora_dropout, found.inference_mode, found.modules_to_save = 0.0, False, None
        return found
    wanted = config.targets or "all-linear"
    return peft.LoraConfig(
        r=config.rank or 16,
        lora_alpha=config.alpha or 32.0,
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
        lora_dropout=0.0,
        task_type=task,
    )


@contextmanager
def _explained(config: LoraConfig) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        what = str(error).partition("\n")[0]
        raise ConfigError(f"the adapter cannot be attached: {what}", where="model.lora") from None


def _refuse_vocabulary(network: Any) -> None:
    """The tiled head and the embedding read the plain matrices: an adapter there would never be trained."""
    found = {id(layer) for _, layer in _layers(network)}
    ends = {"head": network.get_output_embeddings(), "embedding": network.get_input_embeddings()}
    for name, layer in ends.items():
        if layer is not None and id(layer) in found:
            raise ConfigError(f"the {name} cannot have an adapter", where="model.lora.targets", fix="Leave it out.")


def _fill(network: nn.Module, folder: Path, peft: Any, whole: tuple[str, ...]) -> None:
    """Loads a saved adapter, and the modules that were trained whole."""
    if not (folder / WEIGHTS).is_file():
        fix = "Name a folder that peft or prefopt wrote."
        raise ConfigError(f"`{folder}` holds no {WEIGHTS}", where="model.lora.path", fix=fix)
    state = {name.removeprefix(PREFIX): x for name, x in load_file(folder / WEIGHTS).items()}
    for name in [name for name in state if name.rpartition(".")[0] in whole]:
        with torch.no_grad():
            network.get_parameter(name).copy_(state.pop(name))
    found = peft.set_peft_model_state_dict(network, state, adapter_name=NAME)
    if found.unexpected_keys:
        raise ConfigError(f"the adapter does not fit the model: {found.unexpected_keys[0]}", where="model.lora.path")


def _layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer))


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Within it the network is what it was before adapters came."""
    layers = [layer for _, layer in _layers(network)]
    trained = [p for p in network.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p in trained:
            p.requires_grad_(True)


class Without(nn.Module):
    """The network as it was before adapters came, to draw from."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = [network]  # no part of this module: its weights belong to somebody else

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in self.__dict__ else getattr(self.__dict__["inner"][0], name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What it computes with: the weights below the adapters."""
        whole = self.inner[0].state_dict(*args, **kwargs)
        return {name: x for name, x in whole.items() if ".lora_" not in name}

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        found: Iterator[tuple[str, nn.Module]] = self.inner[0].named_modules(*args, **kwargs)
        return found

    @property
    def base_model(self) -> Without:
        """Its backbone, without adapters too."""
        return Without(self.inner[0].base_model)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with disabled(self.inner[0]):
            return self.inner[0](*args, **kwargs)


@torch.no_grad()
def merged(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network without adapters that computes the same."""
    whole = network.inner[0] if isinstance(network, Without) else network
    own = {name: x for name, x in whole.state_dict().items() if ".lora_" not in name}
    found = {name.replace(".base_layer.", "."): x for name, x in own.items()}
    for name, layer in _layers(network):
        found[f"{name}.weight"] = layer.get_base_layer().weight + layer.get_delta_weight(NAME)
    return found


def save(network: nn.Module, folder: Path) -> None:
    """Writes the adapter as peft does, with the modules that were trained whole."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = network.lora
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    state = {name: x for name, x in network.state_dict().items() if name in trained}
    whole = sorted({name.rpartition(".")[0] for name in state if ".lora_" not in name})
    files = {PREFIX + name.replace(f".{NAME}.", "."): x.contiguous() for name, x in state.items()}
    save_file(files, folder / WEIGHTS)
    settings.save_pretrained(folder)
    if whole:
        kept = json.loads((folder / SETTINGS).read_text("utf-8"))
        (folder / SETTINGS).write_text(json.dumps({**kept, "modules_to_save": whole}, indent=1) + "\n", "utf-8")
