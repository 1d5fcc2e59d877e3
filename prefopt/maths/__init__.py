"""Pure tensor functions, the paper's equation beside the line. Torch is loaded on first use."""

from prefopt.maths.constants import stop_gradient
from prefopt.maths.preference import log1mexp, plackett_luce_nll, preference_nll

__all__ = ["log1mexp", "plackett_luce_nll", "preference_nll", "stop_gradient"]
