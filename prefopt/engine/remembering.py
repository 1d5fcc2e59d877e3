"""An arena whose products are kept, and whether a run can learn from them. Knows slots, tokens and what a recall hears;
no sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from prefopt.config import RunConfig
from prefopt.data.render import Tokens
from prefopt.engine.arena import TOLERANCE, arena, stepped, trial
from prefopt.engine.fewrows import able
from prefopt.engine.forward import Scorer, run
from prefopt.engine.layout import Packed
from prefopt.engine.lora import adapted
from prefopt.engine.recall import ROOT, Recall
from prefopt.engine.slots import Slots, parts
from prefopt.sampling import Arena


class Remembering:
    """Implements `prefopt.sampling.Arena` with another whose products it keeps."""

    def __init__(self, arena: Slots, recall: Recall, slots: int) -> None:
        assert arena.few_rows is not None, "such an arena is not heard"
        self.arena, self.recall, self.device = arena, recall, arena.device
        arena.few_rows.heard = recall.heard
        self.trails: list[list[int]] = [[] for _ in range(slots)]
        """The places of the tokens in each slot."""

    def read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        empty = [i for i, prompt in enumerate(prompts) if not prompt]
        for part in filter(None, (*parts(prompts), empty)):
            self._read([prompts[i] for i in part], [slots[i] for i in part])

    def _read(self, prompts: List[tuple[int, ...]], slots: List[int]) -> None:
        longest = max(map(len, prompts), default=0)
        real = torch.tensor([[t < len(prompt) for t in range(longest)] for prompt in prompts], dtype=torch.bool)
        with self.recall.hearing(int(real.sum()), real.flatten()) as place, _Listening(self.recall):
            self.arena.read(prompts, slots)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.trails[slot] = []
            for token in prompt:
                self._step(slot, token, place)
                place += 1

    def copy(self, source: int, targets: List[int], length: int) -> None:
        self.arena.copy(source, targets, length)
        for target in targets:
            self.trails[target] = self.trails[source][:length]

    def advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        with self.recall.hearing(len(tokens)) as place:
            logits = self.arena.advance(tokens, positions, width)
        for slot, (token, position) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            del self.trails[slot][position:]
            self._step(slot, token, place + slot)
        return logits

    def _step(self, slot: int, token: int, fresh: int) -> None:
        trail = self.trails[slot]
        trail.append(self.recall.follow(trail[-1] if trail else ROOT, token, fresh))


class _Listening(TorchFunctionMode):
    """Within it, products of linear layers are heard."""

    def __init__(self, recall: Recall) -> None:
        super().__init__()
        self.recall = recall

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is linear and len(args) >= 2:
            self.recall.heard(args[1], found)
        return found


def reusing(config: RunConfig, scorer: Scorer, world: int, warn: Callable[[str], None]) -> Recall | None:
    """What keeps for the first update of a step what drawing computed, told to the scorer; None where that is not asked
    for or does not hold, of which `warn` hears."""
    budget = config.rollout.reuse_bytes
    if not budget or not config.draws:
        return None
    reason = next(_obstacles(config, scorer, world), None) or _disagreement(scorer)
    if reason is not None:
        warn(f"rollout.reuse_bytes has no effect: {reason}")
        return None
    scorer.recall = Recall(budget, warn)
    return scorer.recall


def _obstacles(config: RunConfig, scorer: Scorer, world: int) -> Iterator[str]:
    if any(draw.source != "policy" for draw in config.draws):
        yield "not all draws are the policy's"
    if world > 1:
        yield "several processes share a step"
    if not able(scorer.network) or config.optim.precision != "float32":
        yield "it is for float32 on a CPU"
    if config.optim.forward != "fast":
        yield "optim.forward is plain"
    if config.optim.gradient_checkpointing:
        yield "optim.gradient_checkpointing computes everything again"
    if adapted(scorer.network):
        yield "the model has adapters"


def _disagreement(scorer: Scorer) -> str | None:
    """Why log-probabilities and a gradient of some sequences are others when what drawing them computed is reused."""
    network, recall = scorer.network, Recall(1 << 62, print)

    def heard(network: Any, slots: int, prompt: int, room: int) -> Remembering | Arena:
        return remembered(arena(network, slots, prompt, room, None, lambda _: None), recall, slots)

    stepped(network, heard)
    tokens = [Tokens(row[:start], row[start:]) for start, row in trial(network)]
    groups = (0, *range(len(tokens) - 1))  # the first two are one prompt's
    if recall.of(Packed.of(tokens, groups, scorer.paths)) is None:
        return "this model is not drawn from in the fastest way"
    expected = _numbers(scorer, tokens, groups)
    scorer.recall = recall
    try:
        found = _numbers(scorer, tokens, groups)
    finally:
        scorer.recall = None
    each = (float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(found, expected, strict=True))
    return next((f"numbers differ by {off:.1g}" for off in each if not off <= TOLERANCE), None)


def _numbers(scorer: Scorer, tokens: List[Tokens], groups: List[int]) -> list[Tensor]:
    """Log-probabilities, and the gradient of a weighted sum of them by every parameter it depends on."""
    parameters = [p for p in scorer.network.parameters() if p.requires_grad]
    with torch.enable_grad():
        output = run(scorer, tokens, ("logps",), parameters[0].device, groups=groups)["logps"]
        weights = torch.linspace(1, 2, output.numel()).view_as(output)
        slopes = torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)
    return [output.detach(), *(x for x in slopes if x is not None)]


def remembered(arena: Arena, recall: Recall | None, slots: int) -> Remembering | Arena:
    """The arena, heard by the recall where there is one and that is possible."""
    if recall is None or not isinstance(arena, Slots) or arena.few_rows is None:
        return arena
    return Remembering(arena, recall, slots)
