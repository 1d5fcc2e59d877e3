"""Pure tensor functions, the paper's equation beside the line. Torch is loaded on first use."""

from prefopt.maths.constants import stop_gradient
from prefopt.maths.policy import (
    adapted_coefficient,
    at_last,
    clipped_surrogate,
    clipped_value_loss,
    discounted_returns,
    gae,
    group_centred,
    group_std,
    importance_weight,
    kl_estimate,
    leave_one_out,
    merged_moments,
    moments_std,
    outside_clip,
    ratio_of,
    whiten,
)
from prefopt.maths.preference import log1mexp, plackett_luce_nll, preference_nll

__all__ = [
    "adapted_coefficient",
    "at_last",
    "clipped_surrogate",
    "clipped_value_loss",
    "discounted_returns",
    "gae",
    "group_centred",
    "group_std",
    "importance_weight",
    "kl_estimate",
    "leave_one_out",
    "log1mexp",
    "merged_moments",
    "moments_std",
    "outside_clip",
    "plackett_luce_nll",
    "preference_nll",
    "ratio_of",
    "stop_gradient",
    "whiten",
]
