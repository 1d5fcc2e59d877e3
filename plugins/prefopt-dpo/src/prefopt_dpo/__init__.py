"""Direct Preference Optimization, as a plugin of prefopt."""

from prefopt.api import hookimpl
from prefopt_dpo.dpo import DPO


@hookimpl
def prefopt_algorithms() -> list[type[DPO]]:
    return [DPO]
