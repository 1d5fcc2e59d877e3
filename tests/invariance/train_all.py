"""Trains several configurations in one process of a distributed launch: `torchrun ... train_all.py RUN.YAML...`."""

import sys
from pathlib import Path
from typing import ClassVar

import torch

from prefopt.api import Algorithm, Batch, Comparison, Loss, Needs, Policy
from prefopt.config import load_run
from prefopt.plugins import Plugins, load
from prefopt.session import train


class Sorted(Algorithm):
    """Couples the minibatch, and reads less than it asks for: values before and after, and an entropy it ignores. Stays
    near a reference."""

    name, eats = "sorted", Comparison
    coupled: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs(before=frozenset({"old_values"}), during=frozenset({"logps", "entropy", "token_kl"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        chosen, rejected = batch.pairs(batch.sum_tokens(policy.logps + batch.old_values))
        gap = chosen.sort().values - rejected.sort().values
        kl = batch.mean(policy.token_kl, "tokens")
        return Loss(batch.mean(torch.nn.functional.softplus(-gap), "pairs") + 0.1 * kl, {"kl": kl})


def quiet_plugins() -> Plugins:
    """All that is installed but the progress display, and the method above."""
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    plugins.registry.add(Sorted, "test", "0")
    return plugins


if __name__ == "__main__":
    plugins = quiet_plugins()
    for path in sys.argv[1:]:
        train(load_run(Path(path), plugins.find), plugins)
