"""The core's own reward sources."""

from __future__ import annotations

from prefopt.api import RewardSource, Scorer, Services, UserPath


class TrainedReward(RewardSource):
    """The score of a reward model that prefopt trained."""

    name = "reward_model"

    path: UserPath
    """The folder of the model."""

    def open(self, services: Services) -> Scorer:
        return services.scorer(self.path)
