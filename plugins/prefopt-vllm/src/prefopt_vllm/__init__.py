"""Drawing with vLLM, as a plugin of prefopt."""

from prefopt.api import Sampler, hookimpl
from prefopt_vllm.sampler import VLLM


@hookimpl
def prefopt_samplers() -> list[type[Sampler]]:
    return [VLLM]
