"""The scorer: one module whose forward runs backbone and head. Knows tokens and outputs; no algorithm, no rows, no
ranks.

The plain path computes whole logits for padded rows under a mask; it stays as the oracle of the fast ones.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.data.render import Tokens
from prefopt.engine.head import token_collision_entropy, token_entropy, token_kl, token_logps
from prefopt.engine.lastlayer import looked_at
from prefopt.engine.layout import PLAIN, Packed, Paths, tree_mask
from prefopt.engine.linear import Head, Layer, Shape, linear_kl, linear_logps
from prefopt.engine.lora import adapted
from prefopt.engine.noise import Change, changing
from prefopt.engine.ranks import unwrap
from prefopt.engine.recall import Known, Recall, recalled
from prefopt.engine.recompute import recomputing
from prefopt.engine.shortrows import ShortRows
from prefopt.errors import ConfigError

LINEAR = frozenset({"logps", "entropy", "collision_entropy"})
DISTRIBUTIONS = LINEAR | {"token_kl"}


class Scorer(nn.Module):
    """A causal language model, or a sequence classifier, with what prefopt adds to it.

    `values` adds a value head: one number for the state before each token; a `critic`, which is a sequence classifier,
    gives these numbers with weights of its own. Dropout is off, always: policy, reference and value passes must agree.
    `beside` holds the reference that `token_kl` compares with: no part of this
    module, for it is neither trained nor saved. `recomputed` are the layers whose insides are not kept.
    """

    def __init__(self, network: nn.Module, values: bool = False, paths: Paths = PLAIN) -> None:
        super().__init__()
        self.network = network.eval()
        self.paths = paths
        self.in_place = False
        self.beside: list[Scorer] = []
        self.recomputed: list[nn.Module] = []
        self.critic: Scorer | None = None
        self.product: Layer | None = None
        self.recall: Recall | None = None
        width = int(self.config.hidden_size)
        self.value_head = nn.Linear(width, 1) if values else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def config(self) -> Any:
        """The network's configuration, as transformers has it."""
        return self.network.config.get_text_config()  # type: ignore[operator,union-attr]

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: everything, or beside adapters only what is trained."""
        state = self.state_dict()
        if not adapted(self.network):
            return state
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: x for name, x in state.items() if name in trained}

    def compare_with(self, reference: Scorer, warn: Callable[[str], None]) -> None:
        """Makes `token_kl` the divergence from this scorer. Both then take the same path."""
        sizes = [scorer.network.get_input_embeddings().weight.shape[0] for scorer in (self, reference)]  # type: ignore[operator]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"the reference has a vocabulary of {sizes[1]:,} tokens, the model one of {sizes[0]:,}: their "
                "distributions cannot be compared",
                where="reference.path",
            )
        self._go_with(reference, "reference", warn)
        self.beside = [reference]

    @contextmanager
    def packed(self, product: Layer | None) -> Iterator[None]:
        """Within it, `product` computes what the output layer makes of states, where nothing is derived from it."""
        self.product = product
        try:
            yield
        finally:
            self.product = None

    def value_by(self, critic: Scorer, warn: Callable[[str], None]) -> None:
        """Makes `values` the critic's. Both then take the same path."""
        self._go_with(critic, "critic", warn)
        self.critic = critic

    def _go_with(self, other: Scorer, name: str, warn: Callable[[str], None]) -> None:
        if (self.paths.layout, self.paths.tiled) != (other.paths.layout, other.paths.tiled):
            warn(f"model and {name} do not allow the same shortcuts: both take the plain path")
            self.paths = other.paths = PLAIN

    def accumulate_in_place(self, head_is_used: bool) -> list[nn.Parameter]:
        """Adds gradients of the vocabulary's matrices where they lie, in place of making new matrices in every
        microbatch. Returns these parameters: their gradients must be zeroed, never dropped, and no rank may wait for
        them. A head that no loss reaches is left alone: a gradient of zero would still let its weights decay."""
        network: Any = self.network
        used = self.paths.tiled and head_is_used
        vectors, head = network.get_input_embeddings(), network.get_output_embeddings() if used else None
        found = {id(p): p for p in (m.weight for m in (vectors, head) if m is not None) if p.requires_grad}
        if any(p.dtype not in (torch.float32, torch.float64) for p in found.values()):
            return []
        for p in found.values():
            p.grad = torch.zeros_like(p)
        vectors.sparse = vectors.weight.requires_grad
        self.in_place = True
        return list(found.values())

    def forward(
        self, packed: Packed, want: Collection[str], temperature: float = 1.0, noise: Change | None = None
    ) -> dict[str, Tensor]:
        """The wanted outputs: `scores` [n]; `logps`, `entropy`, `values`, `token_kl` [n, T] with T the longest
        completion here.

        Positions past a completion hold 0. `noise` is that of this network alone: reference and critic have none.
        """
        with (
            recomputing(self.recomputed, self._attention),
            changing(self.network, noise),
            self._attention(),
            recalled(self.recall if noise is None else None, packed) as known,
        ):
            if set(want) == {"scores"}:
                return {"scores": self._scores(packed)}
            tiled = self.paths.tiled
            found = self._tiled(packed, want, temperature, known) if tiled else self._plain(packed, want, temperature)
            if "values" in want and self.critic is not None:
                found["values"] = self.critic._judged(packed, packed.source)
        return {name: packed.unpacked(x) for name, x in found.items()}

    def _attention(self) -> AbstractContextManager[Any]:
        """That of short rows on a CPU, on every path but the plain one."""
        short = next(self.network.parameters()).device.type == "cpu" and self.paths.layout != "padded"
        return ShortRows() if short else nullcontext()

    def _plain(self, packed: Packed, want: Collection[str], temperature: float) -> dict[str, Tensor]:
        """From whole logits. [S] each."""
        out = self.network(**self._inputs(packed), output_hidden_states=self.value_head is not None)
        found = {}
        if DISTRIBUTIONS & set(want):
            logits = out.logits.flatten(0, 1).index_select(0, packed.source)
            if "logps" in want:
                found["logps"] = token_logps(logits, packed.target, temperature)
            if "entropy" in want:
                found["entropy"] = token_entropy(logits, temperature)
            if "collision_entropy" in want:
                found["collision_entropy"] = token_collision_entropy(logits, temperature)
            if "token_kl" in want:
                found["token_kl"] = token_kl(logits / temperature, self._beside_logits(packed) / temperature)
        if "values" in want and self.critic is None:
            found["values"] = self._values(out.hidden_states[-1].flatten(0, 1).index_select(0, packed.source))
        return found

    def _tiled(
        self, packed: Packed, want: Collection[str], temperature: float, known: Known | None
    ) -> dict[str, Tensor]:
        """From the states that predict a completion token, and no others. [S] each."""
        states = self._states(packed, packed.source)
        found: dict[str, Tensor] = {}
        head = self._head(temperature)
        into = head.weight.grad if self.in_place else None
        if LINEAR & set(want):
            options: dict[str, Any] = {"entropy": "entropy" in want, "collision": "collision_entropy" in want}
            options |= {"keep_bytes": self.paths.keep_bytes, "into": into, "layer": self.product}
            options["known"] = None if known is None else known.predicted(head.weight, states)
            scores = linear_logps(states, head.weight, packed.target, head.bias, head.shape, **options)
            found = {name: x for name, x in scores._asdict().items() if name in want}
        if "token_kl" in want:
            (reference,) = self.beside
            with torch.no_grad():
                others = reference._states(packed, packed.source)
            found["token_kl"] = linear_kl(states, head, others, reference._head(temperature), into=into)
        if "values" in want and self.critic is None:
            found["values"] = self._values(states)
        return found

    def _head(self, temperature: float) -> Head:
        network: Any = self.network
        found = network.get_output_embeddings()
        return Head(found.weight, found.bias, head_shape(self.config, temperature))

    @torch.no_grad()
    def _beside_logits(self, packed: Packed) -> Tensor:
        (reference,) = self.beside
        logits: Tensor = reference.network(**reference._inputs(packed)).logits
        return logits.flatten(0, 1).index_select(0, packed.source)

    def _values(self, states: Tensor) -> Tensor:
        assert self.value_head is not None, "the scorer was built without a value head"
        with torch.autocast(states.device.type, enabled=False):
            return self.value_head(states.float()).squeeze(-1)  # type: ignore[no-any-return]

    def _scores(self, packed: Packed) -> Tensor:
        """The score at the last real token, found by position and never by comparing with a padding id."""
        return self._judged(packed, packed.last)

    def _judged(self, packed: Packed, places: Tensor) -> Tensor:
        """The score head at these flat places. [n]"""
        return self.network.score(self._states(packed, places)).float().squeeze(-1)  # type: ignore[operator,no-any-return]

    def _states(self, packed: Packed, places: Tensor) -> Tensor:
        """What the backbone makes of the tokens at these flat places. [n, H]"""
        backbone: Any = self.network.base_model
        spared = () if self.recomputed and torch.is_grad_enabled() else self.paths.spared
        with looked_at(self.network, spared, places, packed.ids.shape):
            states: Tensor = backbone(**self._inputs(packed)).last_hidden_state
        return states.flatten(0, 1).index_select(0, places)

    def _inputs(self, packed: Packed) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": packed.ids, "attention_mask": packed.attention, "use_cache": False}
        if packed.branch is not None and packed.positions is not None:
            mask = masks(self.config, partial(tree_mask, packed.branch, packed.positions))
            inputs |= {"attention_mask": mask, "position_ids": packed.positions}
        return inputs


def masks(config: Any, visible: Callable[[int | None], Tensor]) -> Tensor | dict[str, Tensor]:
    """A mask as a model wants it: with its sliding window, one for each type of layer, added or selecting. `visible`
    makes it from a window, true at what may be seen."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"no mask is known for layers of type {', '.join(sorted(kinds))}")

    def made(window: int | None) -> Tensor:
        allowed = visible(window)
        if config._attn_implementation != "eager":
            return allowed
        return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)

    if kinds:
        return {"full_attention": made(None), "sliding_attention": made(window)}
    return made(window)


def head_shape(config: Any, temperature: float = 1.0) -> Shape:
    """What a model does between its last matrix and the softmax, by the names transformers gives it."""
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Shape(scale, getattr(config, "final_logit_softcapping", None), temperature)


SLOW = 3.0
"""How many times as long as in float32 a product in another precision may take before it is spoken of."""


def warn_if_slow(device: torch.device, name: str, warn: Callable[[str], None]) -> None:
    """Warns of a precision in which this CPU computes more slowly than in float32, having no instructions for it."""
    if device.type != "cpu" or name == "float32":
        return
    exact, other = (_product_seconds(dtype) for dtype in (torch.float32, getattr(torch, name)))
    if other > SLOW * exact:
        warn(f"a matrix product in {name} takes {other / exact:.0f} times as long as in float32 on this CPU")


def _product_seconds(dtype: torch.dtype) -> float:
    """Of a product [16, 512] x [512, 512], the best of three."""
    rows, matrix = torch.ones(16, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    return min(timeit.repeat(lambda: rows @ matrix, number=1, repeat=3))


def precision(device: torch.device, name: str) -> AbstractContextManager[Any]:
    """Autocast for `bfloat16`; nothing for `float32`."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()


def run(
    module: nn.Module,
    tokens: Sequence[Tokens],
    want: Collection[str],
    device: torch.device,
    dtype: str = "float32",
    groups: Sequence[int] | None = None,
    temperature: float = 1.0,
    noise: Change | None = None,
) -> dict[str, Tensor]:
    """The wanted outputs for these sequences, through `module` (a scorer, wrapped or not). Sequences of one group may
    share what they begin with; without `groups`, or with `noise` of its own, each stands alone."""
    each = range(len(tokens)) if groups is None or noise is not None else groups
    packed = Packed.of(tokens, each, paths_of(module)).to(device)
    with precision(device, dtype):
        outputs: dict[str, Tensor] = module(packed, tuple(want), temperature, noise)
    return outputs


def paths_of(module: nn.Module) -> Paths:
    """The paths of a scorer, wrapped or not."""
    scorer = unwrap(module)
    assert isinstance(scorer, Scorer)
    return scorer.paths
