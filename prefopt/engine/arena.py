"""Which arena a model is drawn in: the fastest whose steps are found to give what each row gives that is read whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prefopt.engine.compiled import Compiled
from prefopt.engine.fewrows import able
from prefopt.engine.graphed import Graphed, tried_graphs
from prefopt.engine.probe import WINDOW, narrow
from prefopt.engine.shared import Shared
from prefopt.engine.slots import Slots
from prefopt.sampling import Arena

TOLERANCE = 1e-4
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError, IndexError)
"""What a model raises that does not do what it is tried for."""
PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (3,), (6, 7, 8, 9), (9, 8, 7, 6, 5, 4, 3, 2, 1))
STEPS = 2 * WINDOW
Maker = Callable[..., Slots]
"""Makes an arena of a network and the numbers that `LanguageModel.arena` is told."""
TRIED: dict[Maker, Maker] = {Graphed: partial(Graphed, recorder=tried_graphs)}
"""What is probed in place of a maker."""


class Apart:
    """Implements `prefopt.sampling.Arena` for every model: each row with a cache of its own, whatever that is."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.device = self.network.get_input_embeddings().weight.device
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.caches: dict[int, Any] = {}
        self.logits: dict[int, Tensor] = {}

    def read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        for prompt, slot in zip(prompts, slots, strict=True):
            self.tokens[slot], self.caches[slot] = (), None
            if prompt:
                self._feed(slot, prompt)

    def copy(self, source: int, targets: List[int], length: int) -> None:
        self.read([self.tokens[source][:length]] * len(targets), targets)

    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        for slot, (token, position) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            if position == len(self.tokens[slot]):
                self._feed(slot, (token,))
        return torch.stack([self.logits[slot] for slot in range(len(tokens))])

    @torch.no_grad()
    def _feed(self, slot: int, tokens: tuple[int, ...]) -> None:
        ids = torch.tensor([tokens], device=self.device)
        out = self.network(input_ids=ids, past_key_values=self.caches[slot], use_cache=True)
        self.tokens[slot] += tokens
        self.caches[slot], self.logits[slot] = out.past_key_values, out.logits[0, -1]


_known: WeakKeyDictionary[nn.Module, tuple[torch.device, bool, Maker | None]] = WeakKeyDictionary()
"""Of each network where it was probed, whether its steps were to be compiled, and what makes its arena there; None
where slots do not hold."""


def arena(
    network: nn.Module,
    slots: int,
    prompt: int,
    room: int,
    whole: int | None,
    warn: Callable[[str], None],
    compiled: bool = False,
) -> Arena:
    """The fastest arena whose steps give what the network gives for each row read whole; `compiled` allows what takes
    a while to make ready. `warn` hears once why it is a slower one."""
    device = network.get_input_embeddings().weight.device  # type: ignore[operator]
    where, tried, maker = _known.get(network, (None, compiled, None))
    changed = maker in (Compiled, Shared) and not Shared.serves(network)
    if where != device or tried != compiled or changed:
        maker = _probed(network, compiled, warn)
        _known[network] = device, compiled, maker
    return Apart(network) if maker is None else maker(network, slots, prompt, room, whole)


def _probed(network: nn.Module, compiled: bool, warn: Callable[[str], None]) -> Maker | None:
    if compiled:
        reason = _uncompilable(network)
        if reason is None:
            return Compiled
        warn(f"rollout.compile has no effect: {reason}")
    first = None
    for maker in _makers(network):
        reason = disagreement(network, TRIED.get(maker, maker))
        if reason is None:
            if first is not None:
                warn(f"rows are drawn in a slower way: the fastest does not hold for this model: {first}")
            return maker
        first = first or reason
    warn(f"rows are drawn one by one: keys and values of many do not hold for this model: {first}")
    return None


def _uncompilable(network: nn.Module) -> str | None:
    """Why steps cannot be compiled; None where they can."""
    if not Compiled.serves(network):
        return "it is for float32 on a CPU, with the attention `sdpa`"
    try:
        reason = disagreement(network, Compiled)
    except Exception as error:  # a compiler has many, and what it is for is not missing without it
        return refusal(error)
    return reason if reason or Compiled.knows(network) else "no matrix of the model is large enough to be packed"


def _makers(network: nn.Module) -> Iterator[Maker]:
    """The fastest first."""
    if Graphed.serves(network):
        yield Graphed
    if Shared.serves(network):
        yield Shared
    yield Slots
    if able(network):
        yield partial(Slots, fast=False)


def disagreement(network: Any, maker: Maker) -> str | None:
    """Why rows of different lengths in such an arena, one of them forked and one moved, give other logits than each
    read whole; None where they do not. A sliding window is narrowed meanwhile, so that rows reach beyond it."""
    try:
        with narrow(network.config.get_text_config()):
            found, expected = stepped(network, maker), _whole(network)
    except REFUSALS as error:
        return refusal(error)
    known = expected.isfinite()  # a word may be ruled out by a logit of minus infinity
    if not torch.equal(found[~known], expected[~known]):
        return "infinite logits differ"
    off = float((found - expected)[known].abs().amax() / (1 + expected[known].abs().amax()))
    return None if off <= TOLERANCE else f"they differ by {off:.1g}"


def refusal(error: Exception) -> str:
    """One of these, as a reason to go another way."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


def _prompts(network: Any) -> list[tuple[int, ...]]:
    """The prompts of the probe, in tokens that the model has."""
    size = network.get_input_embeddings().weight.shape[0]
    return [tuple(token % size for token in prompt) for prompt in PROMPTS]


def _rows(network: Any) -> list[tuple[int, ...]]:
    """Each prompt of the probe with the tokens that follow; the first is there twice, forked."""
    size, prompts = network.get_input_embeddings().weight.shape[0], _prompts(network)
    tails = [tuple((2 + (7 * i + 3 * k) % 9) % size for k in range(STEPS)) for i in range(len(prompts) + 1)]
    return [(*prompt, *tail) for prompt, tail in zip([prompts[0], *prompts], tails, strict=True)]


def trial(network: Any) -> list[tuple[int, tuple[int, ...]]]:
    """The rows of the probe, with the lengths of their prompts; the first two have the same."""
    prompts = _prompts(network)
    return [(len(prompt), row) for prompt, row in zip((prompts[0], *prompts), _rows(network), strict=True)]


def stepped(network: Any, maker: Callable[..., Any]) -> Tensor:
    """The logits of each step, [rows, STEPS, V]; those of the first row's last step are of that row alone."""
    prompts = _prompts(network)
    starts, rows = zip(*trial(network), strict=True)
    last = len(rows) - 1
    slots = maker(network, len(rows) + 1, max(starts), STEPS)
    slots.read([prompts[1], prompts[1]], [1, last])  # as when a slot is used again
    slots.read(prompts, [last + 1, *range(2, last + 1)])
    slots.copy(last + 1, [0, 1], starts[0])
    steps = []
    for k in range(STEPS):
        places = torch.tensor([start + k for start in starts], device=slots.device)
        tokens = torch.tensor([row[start + k] for row, start in zip(rows, starts, strict=True)], device=slots.device)
        steps.append(slots.advance(tokens, places, int(places.max()) + 1))
    steps[-1] = torch.cat([slots.advance(tokens[:1], places[:1], int(places[0]) + 1), steps[-1][1:]])
    return torch.stack(steps, 1)


@torch.no_grad()
def _whole(network: Any) -> Tensor:
    device = network.get_input_embeddings().weight.device
    each = [
        network(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0, -STEPS:]
        for row in _rows(network)
    ]
    return torch.stack(each)
