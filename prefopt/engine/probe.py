"""Which fast paths hold for a model: each is compared with the plain path on a few tokens before it is used.

It knows no architecture by name. A path that gives other numbers, or that the model refuses, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefopt.data.render import Tokens
from prefopt.engine.forward import Scorer, run
from prefopt.engine.lastlayer import spared
from prefopt.engine.layout import PLAIN, Paths
from prefopt.engine.linear import KEEP_BYTES

KEPT = (KEEP_BYTES, 256 << 20)
"""The least and the most bytes of logits that are kept unless told otherwise: one for each weight between them."""
WINDOW = 4
TOLERANCE = 1e-4
GROUPS = (0, 0, 1, 2, 2, 2, *(3,) * 6)
LENGTHS = ((9, 5), (9, 8), (12, 3), (1, 6), (1, 2), (1, 9), *((5, 4 + n % 3) for n in range(6)))
"""Prompt and completion of each sequence: longer than the window, one prompt of a single token, one of many samples."""


def probe(scorer: Scorer, warn: Callable[[str], None], keep_bytes: int | None = None) -> Paths:
    """The fastest paths that agree with each sequence scored alone, in values and in a gradient; `warn` hears what does
    not. Of logits they keep `keep_bytes`, or what suits the size of the model, whatever its vocabulary.

    A sliding window is narrowed meanwhile, so that the probe reaches beyond it. The scorer is as before afterwards.
    """
    before, reach = scorer.paths, _reach(scorer)
    keep = min(max(_weights(scorer), KEPT[0]), KEPT[1]) if keep_bytes is None else keep_bytes
    tiled = [Paths(layout, tiled=True, keep_bytes=keep, reach=reach) for layout in ("shared", "causal")]
    whole = [Paths(layout, reach=reach) for layout in ("shared", "causal")]
    try:
        with narrow(scorer.config):
            expected = _numbers(scorer, PLAIN, alone=True)
            for paths in (*tiled, *whole, PLAIN):
                reason = _disagreement(scorer, paths, expected)
                if reason is None:
                    return paths if paths == PLAIN else _sparing(scorer, paths, expected)
                warn(f"the {paths.layout}{', tiled' * paths.tiled} path is not used for this model: {reason}")
    finally:
        scorer.paths = before
    warn("no path agrees with sequences scored alone: padding or rounding changes what this model computes")
    return PLAIN


def _sparing(scorer: Scorer, paths: Paths, expected: list[Tensor]) -> Paths:
    """The same with what can be spared tokens in the last layer."""
    more = replace(paths, spared=spared(scorer.network))
    return more if _disagreement(scorer, more, expected) is None else paths


def _disagreement(scorer: Scorer, paths: Paths, expected: list[Tensor]) -> str | None:
    try:
        found = _numbers(scorer, paths)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError) as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
    each = [float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(found, expected, strict=True)]
    return next((f"it differs by {off:.1g}" for off in each if not off <= TOLERANCE), None)  # or is not a number


def _numbers(scorer: Scorer, paths: Paths, alone: bool = False) -> list[Tensor]:
    """The probe's outputs [n, T] or [n], and the gradient of a weighted sum of them by the smallest parameter."""
    scorer.paths = paths
    tokens, parameters = _tokens(scorer), [p for p in scorer.network.parameters() if p.requires_grad]
    want = "scores" if hasattr(scorer.network, "score") else "logps"
    device = next(scorer.network.parameters()).device
    with torch.enable_grad():
        if alone:
            parts = [run(scorer, [t], (want,), device)[want][0] for t in tokens]
            output = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) if want == "logps" else torch.stack(parts)
        else:
            output = run(scorer, tokens, (want,), device, groups=GROUPS)[want]
        weights = torch.linspace(1, 2, output.numel(), device=device).view_as(output)
        slopes = torch.autograd.grad((output * weights).sum(), sorted(parameters, key=Tensor.numel)[:1])
    return [output.detach(), *slopes]


def _tokens(scorer: Scorer) -> list[Tokens]:
    """Random tokens; the prompt of a group is one and the same."""
    vocabulary = scorer.config.vocab_size
    drawn = torch.randint(vocabulary, (20 * (len(GROUPS) + 3),), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for i, (group, (prompt, completion)) in enumerate(zip(GROUPS, LENGTHS, strict=True)):
        own = drawn[20 * (i + 3) : 20 * (i + 3) + completion]
        found.append(Tokens(tuple(drawn[20 * group : 20 * group + prompt]), tuple(own)))
    return found


@contextmanager
def narrow(config: Any) -> Iterator[None]:
    """A sliding window narrower than the probe."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        yield
        return
    config.sliding_window = min(window, WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


def _reach(scorer: Scorer) -> float:
    """The row length at which attention costs as much as the matrix products: N / (L a), of N weights in L layers with
    heads a wide together."""
    config = scorer.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(_weights(scorer) / (config.num_hidden_layers * config.num_attention_heads * size))


def _weights(scorer: Scorer) -> int:
    """How many there are outside of the vocabulary."""
    network: Any = scorer.network
    vectors = network.get_input_embeddings().weight.numel()
    return int(sum(p.numel() for p in network.base_model.parameters()) - vectors)
