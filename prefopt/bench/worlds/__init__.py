"""Worlds: small settings in which the true reward is known."""
