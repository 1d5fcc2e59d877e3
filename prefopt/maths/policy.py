"""Policy gradients: divergences from samples, advantages, clipped objectives. Nothing here knows where the numbers come
from.

Shapes: N sequences, T completion positions; `mask` [N, T] is True at real tokens, whatever stands elsewhere is ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from prefopt.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

LARGEST: Final = 60.0
"""Of an exponent: e^60 is finite in float32, and so is its product with a gradient."""


# --- divergences ----------------------------------------------------------------------------------------------------


def ratio_of(log_ratio: Tensor) -> Tensor:
    """`r = e^x`, x the log-probability now minus the one before; x counts as at most 60.

    >>> import torch
    >>> ratio_of(torch.tensor([0.0, 1e4])).isfinite().all()
    tensor(True)
    """
    return log_ratio.clamp(max=LARGEST).exp()


def kl_estimate(log_ratio: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """An estimate of KL(π || π_ref) from a sample of π, `log_ratio` being log π - log π_ref (Schulman 2020).

    k1 = x:                unbiased, of either sign; its own gradient is 0 in expectation.
    k2 = x² / 2:           biased, never negative; its gradient on samples of π is that of the KL divergence.
    k3 = e^(-x) - 1 + x:   unbiased, never negative; its gradient is that of KL(π_ref || π).

    >>> import torch
    >>> [kl_estimate(torch.tensor(1.0), k).item() for k in ("k1", "k2")]
    [1.0, 0.5]
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1((-log_ratio).clamp(max=LARGEST)) + log_ratio


def adapted_coefficient(coefficient: Tensor, kl: Tensor, target: float, samples: int, horizon: float) -> Tensor:
    """`β ← β (1 + clip(KL / target - 1, ±0.2) n / horizon)`: KL's coefficient after a step of n samples whose mean KL
    for a whole completion was `kl`. Ziegler et al. 2019, arXiv:1909.08593.

    >>> import torch
    >>> adapted_coefficient(torch.tensor(0.1), torch.tensor(12.0), target=6.0, samples=100, horizon=1000)
    tensor(0.1020)
    """
    error = (kl / target - 1).clamp(-0.2, 0.2)
    return coefficient * (1 + error * samples / horizon)


def importance_weight(log_gap: Tensor, cap: float) -> Tensor:
    """`min(e^x, cap)`, x the trainer's log-probability minus the sampler's: a truncated importance weight, which makes
    up for a sampler that is not quite the policy (Ionides 2008).

    >>> import torch
    >>> importance_weight(torch.tensor([0.0, 5.0]), cap=2.0)
    tensor([1., 2.])
    """
    return ratio_of(log_gap).clamp(max=cap)


# --- rewards, values, advantages ------------------------------------------------------------------------------------


def at_last(x: Tensor, mask: Tensor) -> Tensor:
    """[N] -> [N, T]: each number at its sequence's last real token, 0 elsewhere.

    >>> import torch
    >>> at_last(torch.tensor([5.0]), torch.tensor([[True, True, False]]))
    tensor([[0., 5., 0.]])
    """
    later = mask.flip(-1).cumsum(-1).flip(-1)  # real tokens from here on
    return x[:, None] * ((later == 1) & mask)


def discounted_returns(rewards: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """`G_t = r_t + γ G_{t+1}` over real tokens, [N, T]; 0 elsewhere.

    >>> import torch
    >>> discounted_returns(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]), 0.5)
    tensor([[2., 2., 0.]])
    """
    return gae(rewards, torch.zeros_like(rewards), mask, discount, decay=1.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, decay: float, after: Tensor | None = None
) -> Tensor:
    """Generalized advantage estimates, [N, T]; 0 outside the mask. Schulman et al. 2015, arXiv:1506.02438, eq. 16.

    `values[t]` is the value before token t; `after` [N] that after the last one, 0 for a completion that has ended. The
    returns to learn values from are `gae(...) + values`, before any whitening.

    >>> import torch
    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[True, True]]), 1.0, 0.5)
    tensor([[0.2500, 0.5000]])
    """
    out = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    value = advantage if after is None else after
    for t in range(rewards.shape[1] - 1, -1, -1):
        surprise = rewards[:, t] + discount * value - values[:, t]  # δ_t = r_t + γ v_{t+1} - v_t
        advantage = torch.where(mask[:, t], surprise + discount * decay * advantage, advantage)  # A_t = δ_t + γλ A_t+1
        value = torch.where(mask[:, t], values[:, t], value)
        out[:, t] = advantage.masked_fill(~mask[:, t], 0.0)
    return out


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over real tokens (ddof 1), 0 elsewhere; without `shift_mean` the mean is kept.

    A single number has no variance: it is centred and not scaled.

    >>> import torch
    >>> yes = torch.ones(1, 2, dtype=torch.bool)
    >>> whiten(torch.tensor([[1.0, 3.0]]), yes), whiten(torch.tensor([[1.0, 3.0]]), yes, shift_mean=False)
    (tensor([[-0.7071,  0.7071]]), tensor([[1.2929, 2.7071]]))
    """
    real = x[mask]
    mean = real.mean() if len(real) else x.new_zeros(())
    scale = (real.var(correction=1) + eps).rsqrt() if len(real) > 1 else x.new_ones(())
    return ((x - mean) * scale + (0.0 if shift_mean else mean)).masked_fill(~mask, 0.0)


# --- groups ---------------------------------------------------------------------------------------------------------


def group_sums(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """[N], [N] -> the sum over each number's group and the group's size, for each number."""
    _, place = torch.unique(group, return_inverse=True)
    sums, sizes = x.new_zeros(len(x)), x.new_zeros(len(x))
    sums.index_add_(0, place, x)
    sizes.index_add_(0, place, torch.ones_like(x))
    return sums[place], sizes[place]


def group_centred(x: Tensor, group: Tensor) -> Tensor:
    """`x_i - mean of its group`, [N]; exactly 0 where all of a group are equal.

    >>> import torch
    >>> group_centred(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    tensor([-1.,  1.,  0.])
    """
    sums, sizes = group_sums(x, group)
    return (x - sums / sizes).masked_fill(_all_equal(x, group), 0.0)


def leave_one_out(x: Tensor, group: Tensor) -> Tensor:
    """`x_i - mean of the others in its group` = K / (K - 1) (x_i - mean), [N]; 0 for one that has no others.

    >>> import torch
    >>> leave_one_out(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    tensor([-2.,  2.,  0.])
    """
    _, sizes = group_sums(x, group)
    return group_centred(x, group) * sizes / (sizes - 1).clamp(min=1)


def group_std(x: Tensor, group: Tensor, ddof: int = 1) -> Tensor:
    """`sqrt(Σ (x_j - mean)² / (K - ddof))` of each number's group, [N]; 0 where the group is too small for it.

    >>> import torch
    >>> group_std(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), ddof=0)
    tensor([1., 1., 0.])
    """
    squares, sizes = group_sums(group_centred(x, group).square(), group)
    return (squares / (sizes - ddof).clamp(min=1)).sqrt()


def _all_equal(x: Tensor, group: Tensor) -> Tensor:
    """[N] Whether all of each number's group are equal: a mean of equal numbers is not always equal to them."""
    _, place = torch.unique(group, return_inverse=True)
    low, high = (x.new_zeros(len(x)).scatter_reduce(0, place, x, way, include_self=False) for way in ("amin", "amax"))
    return (low == high)[place]


# --- running moments ------------------------------------------------------------------------------------------------


def merged_moments(moments: Tensor, x: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations [3] of all numbers so far, with those of `x` [n] added (Chan et al.
    1983).

    >>> import torch
    >>> merged_moments(merged_moments(torch.zeros(3), torch.tensor([1.0])), torch.tensor([3.0]))
    tensor([2., 2., 2.])
    """
    if not len(x):
        return moments
    count, mean, squares = moments
    added, own = torch.tensor(float(len(x))).to(moments), x.to(moments)
    gap, total = own.mean() - mean, count + added
    more = (own - own.mean()).square().sum() + gap.square() * count * added / total
    return torch.stack([total, mean + gap * added / total, squares + more])


def moments_std(moments: Tensor, eps: float = 1e-8) -> Tensor:
    """The standard deviation (ddof 1, plus `eps`) that `merged_moments` stands for; 1 for fewer than two numbers.

    >>> import torch
    >>> moments_std(torch.tensor([2.0, 2.0, 2.0]))
    tensor(1.4142)
    """
    count, _, squares = moments
    return (squares / (count - 1)).sqrt() + eps if count > 1 else torch.ones_like(count)


# --- objectives -----------------------------------------------------------------------------------------------------


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None
) -> Tensor:
    """`-min(r A, clip(r, 1 - low, 1 + high) A)`, element by element. Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    With `dual` the loss of a negative advantage is at most `-dual A` (Ye et al. 2019, arXiv:1912.09729).

    >>> import torch
    >>> clipped_surrogate(torch.tensor(3.0).log(), torch.tensor([1.0, -1.0]), 0.2, 0.2)
    tensor([-1.2000,  3.0000])
    >>> clipped_surrogate(torch.tensor(3.0).log(), torch.tensor([1.0, -1.0]), 0.2, 0.2, dual=2.0)
    tensor([-1.2000,  2.0000])
    """
    ratio = ratio_of(log_ratio)
    loss = torch.maximum(-ratio * advantage, -ratio.clamp(1 - low, 1 + high) * advantage)
    return loss if dual is None else torch.where(advantage < 0, torch.minimum(loss, -dual * advantage), loss)


def outside_clip(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Whether `clipped_surrogate` has no gradient there: the ratio has gone beyond the clip, the way the advantage
    wants it to go.

    >>> import torch
    >>> outside_clip(torch.tensor(3.0).log(), torch.tensor([1.0, -1.0]), 0.2, 0.2)
    tensor([ True, False])
    """
    ratio = ratio_of(log_ratio)
    return ((ratio > 1 + high) & (advantage > 0)) | ((ratio < 1 - low) & (advantage < 0))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """`½ max((v - R)², (clip(v, v_old ± clip) - R)²)`, element by element; `½ (v - R)²` without a clip.

    >>> import torch
    >>> clipped_value_loss(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(2.0), 0.5)
    tensor(1.1250)
    """
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2
