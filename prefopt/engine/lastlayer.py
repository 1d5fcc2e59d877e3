"""The last layer, computed for the tokens whose states are looked at. Knows modules and places; no architecture.

What a module makes of one token in the last layer, be it queries or a feed-forward network, reaches no other token:
where nobody looks at that token, it need not be computed. Keys and values do reach others. Which modules are of which
kind is found by trying.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

WORTH = 0.8
"""The share of tokens that are looked at, up to which leaving out the others is faster."""
TOLERANCE = 1e-3
"""In units of what the layer adds."""
ROWS, WIDTH = 2, 10
PLACES = (4, 9, 13, 17)
"""What is looked at while trying, among the ROWS x WIDTH tokens."""


@contextmanager
def looked_at(network: nn.Module, names: Sequence[str], places: Tensor, shape: Sequence[int]) -> Iterator[set[str]]:
    """Within it, these modules compute what they make of the tokens at flat `places` of rows of that `shape` [R, W],
    and give 0 for the others. Yields the names of those that have done so."""
    places, done = torch.unique(places), set[str]()
    if len(places) > WORTH * shape[0] * shape[1]:
        names = ()
    with ExitStack() as stack:
        for name in names:
            module = network.get_submodule(name)
            spared = partial(_spared, module.forward, places, shape[0] * shape[1], partial(done.add, name))
            stack.enter_context(_replaced(module, spared))
        yield done


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    own = vars(module)
    usual = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        if usual is not None:
            own["forward"] = usual


def _spared(forward: Any, places: Tensor, tokens: int, say: Any, *given: Any, **options: Any) -> Any:
    """What `forward` makes of states [R, W, in] or [R * W, in] at these places, 0 elsewhere; all of it where it is
    given anything else."""
    if options or len(given) != 1 or not isinstance(given[0], Tensor) or given[0].shape[:-1].numel() != tokens:
        return forward(*given, **options)
    say()
    outer, flat = given[0].shape[:-1], given[0].flatten(0, -2)
    found = forward(flat.index_select(0, places).view(*(1,) * (len(outer) - 1), len(places), -1)).flatten(0, -2)
    every = found.new_zeros(tokens, found.shape[-1])
    return every.index_copy(0, places, found).view(*outer, -1)


@torch.no_grad()
def spared(network: Any) -> tuple[str, ...]:
    """The names of the modules, in the network's last layer, that can be spared the tokens nobody looks at; none where
    weights are not of float32, or no module is found that others depend on. Weights are as before afterwards."""
    backbone, size = network.base_model, network.config.get_text_config().num_hidden_layers
    stacks = (m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == size)
    last = next((stack[-1] for stack in stacks), None)
    if last is None or any(p.dtype != torch.float32 for p in network.parameters()):
        return ()
    with _borrowed(last):
        trial = _Trial.of(network, last)
        found = tuple(trial.alone(last))
    return found if trial.missed else ()


@dataclass
class _Trial:
    """Tries modules of a layer, whose weights are random meanwhile: in a layer that has not learned yet, what reaches
    other tokens may be nothing."""

    network: Any
    names: dict[nn.Module, str]
    expected: Tensor
    added: float
    """The most that the layer adds to a number."""
    missed: list[str] = field(default_factory=list)
    """Parts that were spared tokens and that others depend on."""

    @classmethod
    def of(cls, network: Any, layer: nn.Module) -> _Trial:
        draw = torch.Generator().manual_seed(1)
        for p in layer.parameters():
            random = torch.rand(p.shape, generator=draw)
            p.copy_(0.5 + random if p.dim() < 2 else (random - 0.5) * (12 / p.shape[-1]) ** 0.5)
        expected, _ = _states(network, ())
        matrices = [(p, p.clone()) for p in layer.parameters() if p.dim() > 1]
        for p, _ in matrices:
            p.zero_()
        without, _ = _states(network, ())
        for p, drawn in matrices:
            p.copy_(drawn)
        names = {module: name for name, module in network.named_modules()}
        return cls(network, names, expected, float((expected - without).abs().max()))

    def alone(self, module: nn.Module) -> Iterator[str]:
        """Of the parts of a module that have matrices the largest that can be spared tokens."""
        for part in module.children():
            if not any(p.dim() > 1 for p in part.parameters()):
                continue
            if self.agrees(self.names[part]):
                yield self.names[part]
            else:
                yield from self.alone(part)

    def agrees(self, name: str) -> bool:
        try:
            found, done = _states(self.network, (name,))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False
        if bool((found - self.expected).abs().max() <= TOLERANCE * self.added):
            return name in done
        self.missed.append(name)
        return False


def _states(network: Any, names: Sequence[str]) -> tuple[Tensor, set[str]]:
    """What the backbone makes of the tokens that are looked at, [n, H], and who was spared the others."""
    vectors = network.get_input_embeddings().weight
    places = torch.tensor(PLACES, device=vectors.device)
    ids = torch.randint(len(vectors), (ROWS, WIDTH), generator=torch.Generator().manual_seed(0)).to(vectors.device)
    with looked_at(network, names, places, ids.shape) as done:
        states: Tensor = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1).index_select(0, places), done


@contextmanager
def _borrowed(layer: nn.Module) -> Iterator[None]:
    """Its weights are afterwards what they were."""
    kept = [(p, p.clone()) for p in layer.parameters()]
    try:
        yield
    finally:
        for p, before in kept:
            p.copy_(before)
