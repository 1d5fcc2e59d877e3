"""Pure tensor functions, the paper's equation beside the line. Torch is loaded on first use."""

from prefopt.maths.preference import plackett_luce_nll, preference_nll

__all__ = ["plackett_luce_nll", "preference_nll"]
