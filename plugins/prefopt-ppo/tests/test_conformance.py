"""PPO keeps its promises, whatever path its settings take."""

from __future__ import annotations

from pathlib import Path

from prefopt_ppo import METHODS, PPO

from prefopt.testing import conformance, pinned

test_conformance = conformance(*METHODS)
OTHERS = (
    PPO(inner_epochs=1, kl_in="loss", kl_target=0.5),
    PPO(kl_in="loss", kl_estimator="k3", entropy=0.01, importance_cap=2.0),
    PPO(kl_target=0.5, kl_horizon=100, dual_clip=1.5, clip_high=0.28),
    PPO(beta=0.0, truncated="bootstrap", normalise="standardise", score_clip=0.5),
    PPO(truncated="drop", n=3, normalise="scale", value_clip=None, whiten_advantages=False),
    PPO(truncated="end", discount=0.9, decay=0.8, minibatches=2),
)
test_conformance_of_other_settings = conformance(*OTHERS)
test_numbers_stay = pinned(Path(__file__).with_name("pins.json"), *METHODS, *OTHERS)
