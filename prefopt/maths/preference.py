"""Likelihoods of preferences and rankings. Nothing here knows where the numbers come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


def preference_nll(margin: Tensor, flipped: float | Tensor = 0.0) -> Tensor:
    """`-(1-ε) log σ(m) - ε log σ(-m)`: the cross-entropy of a preference with logit `margin`, element by element.

    `flipped` is the probability ε that the label is the other way round: label smoothing (cDPO) when it is one number,
    a soft label when it is a tensor (0.5: a tie). Bradley & Terry 1952. Finite for every finite margin.

    >>> import torch
    >>> preference_nll(torch.tensor([0.0, 2.0]))
    tensor([0.6931, 0.1269])
    >>> preference_nll(torch.tensor(2.0), 0.5) == preference_nll(torch.tensor(-2.0), 0.5)
    tensor(True)
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(1 - flipped) * log_sigmoid(margin) - flipped * log_sigmoid(-margin)


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - e^x)` for x < 0, accurate at both ends (Maechler 2012): log odds of a log-probability are `x -
    log1mexp(x)`.

    An x of 0, a probability of 1 to rounding, counts as the largest number below it, so that the result is finite; no
    gradient flows from there.

    >>> import torch
    >>> log1mexp(torch.tensor([-0.5, -20.0, 0.0]))
    tensor([-9.3275e-01, -2.0612e-09, -1.5942e+01])
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -0.6931471805599453
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def plackett_luce_nll(scores: Tensor, ranks: Tensor, present: Tensor) -> Tensor:
    """`-Σ_k log [ e^{r_k} / Σ_{i: rank_i >= rank_k} e^{r_i} ]`: minus the log-likelihood of each ranking, [G, K] ->
    [G].

    `ranks` are places, 0 the best; `present` is False where a group has fewer than K members. Tied members all compete
    with each other and with everything below (Breslow's convention, Biometrics 1974). Plackett 1975, Luce 1959; without
    ties and with K = 2 it is `preference_nll`.

    >>> import torch
    >>> yes = torch.tensor([[True, True, True]])
    >>> plackett_luce_nll(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 2.0]]), yes)   # log 3!
    tensor([1.7918])
    """
    competes = (ranks[:, None, :] >= ranks[:, :, None]) & present[:, None, :]  # [G, k, i]
    rivals = scores[:, None, :].masked_fill(~competes, -torch.inf)
    rivals = torch.where(present[:, :, None], rivals, torch.zeros_like(rivals))  # no row of -inf alone
    nll = torch.logsumexp(rivals, dim=-1) - scores
    return nll.masked_fill(~present, 0.0).sum(-1)
