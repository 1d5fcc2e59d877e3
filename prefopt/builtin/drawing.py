"""From logits to tokens: filters, and one uniform number for each token. Knows rows of numbers; no model, no request.

A distribution is what softmax and the filters leave of it, not normalised again; its sum is formed where it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.api import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

TILE = 256
"""Words whose probabilities are added up together: a token is looked for among the sums, then in its tile."""


def most_probable(p: Tensor, k: int) -> Tensor:
    """Of each row of `p` [n, V] the k most probable words, and those as probable as the last; 0 elsewhere (Fan et al.
    2018, arXiv:1805.04833).

    >>> most_probable(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2)
    tensor([[0.0000, 0.4000, 0.0000, 0.3000]])
    """
    return _at_least(p, p.topk(min(k, p.shape[-1]), dim=-1).values[:, -1:])


def nucleus(p: Tensor, share: float) -> Tensor:
    """The fewest most probable words that together hold `share` of each row, and those as probable as the last; 0
    elsewhere (Holtzman et al. 2020, arXiv:1904.09751).

    >>> nucleus(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.65)
    tensor([[0.0000, 0.4000, 0.0000, 0.3000]])
    """
    ranked = p.sort(dim=-1, descending=True).values
    reached = ranked.cumsum(-1, dtype=torch.double)
    held = (reached - ranked < share * reached[:, -1:]).sum(-1, keepdim=True)
    return _at_least(p, ranked.gather(-1, held - 1))


def near_the_best(p: Tensor, share: float) -> Tensor:
    """The words at least `share` times as probable as the best of each row; 0 elsewhere (Nguyen et al. 2024,
    arXiv:2407.01082).

    >>> near_the_best(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.6)
    tensor([[0.0000, 0.4000, 0.0000, 0.3000]])
    """
    return _at_least(p, share * p.amax(-1, keepdim=True))


def _at_least(p: Tensor, threshold: Tensor) -> Tensor:
    return p.where(p >= threshold, 0.0)


def draw(p: Tensor, uniforms: Tensor, greedy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A token of each row of `p` [n, V] and its log-probability, [n] each: the inverse of the cumulative distribution
    at `uniforms` [n], or where `greedy` [n] the most probable token.

    Sums are in double precision but within a tile. A word of probability 0 is never drawn.

    >>> draw(torch.tensor([[0.25, 0.0, 0.25]]), torch.tensor([0.5]).double())[0]
    tensor([2])
    """
    tiles = _tiled(p)
    sums = tiles.sum(-1).double().cumsum(-1)
    total = sums[:, -1]
    tile, left = _find(sums, uniforms * total)
    inside = tiles.gather(1, tile[:, None, None].expand(-1, 1, tiles.shape[2])).squeeze(1).double().cumsum(-1)
    token = tile * tiles.shape[2] + _find(inside, left)[0]
    if greedy is not None:
        token = torch.where(greedy, p.argmax(-1), token)
    chosen = p.gather(1, token[:, None]).squeeze(1)
    return token, (chosen / total).log()


def _tiled(p: Tensor) -> Tensor:
    """[n, V] -> [n, tiles, TILE], with 0 behind the last word."""
    missing = -p.shape[1] % TILE
    padded = torch.nn.functional.pad(p, (0, missing)) if missing else p
    return padded.view(len(p), -1, TILE)


def _find(reached: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sums `reached` [n, k] first exceed `wanted` [n], and what is wanted beyond the sum before. The last of
    them is exceeded by rounding alone: `wanted` is then just below it."""
    below = torch.minimum(wanted, torch.nextafter(reached[:, -1], torch.zeros_like(wanted)))
    place = torch.searchsorted(reached, below[:, None], right=True).clamp(max=reached.shape[1] - 1)
    before = torch.where(place > 0, reached.gather(1, (place - 1).clamp(min=0)), 0.0)
    return place.squeeze(1), below - before.squeeze(1)
