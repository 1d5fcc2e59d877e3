"""Whether a run can learn from what drawing computed: found out by trying, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from math import inf
from typing import Any

import torch
from torch import Tensor

from prefopt.config import RunConfig
from prefopt.data.render import Tokens
from prefopt.engine.arena import REFUSALS, TOLERANCE, arena, refusal, stepped, trial
from prefopt.engine.fewrows import able
from prefopt.engine.forward import Scorer, run
from prefopt.engine.lora import adapted
from prefopt.engine.recall import Recall
from prefopt.engine.remembering import remembered
from prefopt.sampling import Arena


def reusing(config: RunConfig, scorer: Scorer, world: int, warn: Callable[[str], None]) -> Recall | None:
    """What keeps for the first update of a step what drawing computed, told to the scorer; None where that is not asked
    for or does not hold, of which `warn` hears."""
    budget = config.rollout.reuse_bytes
    if not budget or not config.draws:
        return None
    reason = next(_obstacles(config, scorer, world), None) or _disagreement(scorer, config.rollout.compile, warn)
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


def _disagreement(scorer: Scorer, compiled: bool, warn: Callable[[str], None]) -> str | None:
    """Why log-probabilities and gradients of some sequences are others when what drawing them computed is reused."""
    network, recall = scorer.network, Recall(inf, warn)

    def heard(network: Any, slots: int, prompt: int, room: int) -> Arena:
        return remembered(arena(network, slots, prompt, room, None, warn, compiled), recall, slots)

    stepped(network, heard)
    if not recall.kept:
        return "this model is not drawn from in the fastest way"
    tokens = [Tokens(row[:start], row[start:]) for start, row in trial(network)]
    groups = (0, *range(len(tokens) - 1))  # the first two are one prompt's
    expected = _numbers(scorer, tokens, groups)
    scorer.recall = recall
    try:
        found = _numbers(scorer, tokens, groups)
    except REFUSALS as error:
        return refusal(error)
    finally:
        scorer.recall = None
    if not recall.share:
        return "layers are given something else than in drawing"
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
