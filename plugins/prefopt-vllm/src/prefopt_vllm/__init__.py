"""Drawing with vLLM, as a plugin of prefopt."""

from prefopt.api import Sampler, hookimpl


@hookimpl
def prefopt_samplers() -> list[type[Sampler]]:
    from prefopt_vllm.sampler import VLLM

    return [VLLM]
