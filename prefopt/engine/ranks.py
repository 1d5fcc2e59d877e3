"""Devices and processes, through accelerate. The rest of the engine asks here and never counts ranks itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from prefopt.engine.memory import keep_freed
from prefopt.errors import ResourceError

T = TypeVar("T")


class Ranks:
    """This process's place among the ranks, and its device. A process alone may have another device in each run."""

    def __init__(self, device: Literal["auto", "cpu", "cuda"] = "auto", threads: int | None = None) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ResourceError("no CUDA device is available", where="run.device", fix="Set run.device to auto or cpu.")
        if threads is not None:
            torch.set_num_threads(threads)
        cpu = device == "cpu" or not torch.cuda.is_available()
        self.state = PartialState(cpu=cpu)
        self.rank: int = self.state.process_index
        self.world: int = self.state.num_processes
        self.device = torch.device(self.state.device if self.world > 1 else "cpu" if cpu else "cuda")
        torch.use_deterministic_algorithms(self.device.type == "cpu")
        if self.device.type == "cpu":
            keep_freed()
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same tensor on all of them."""
        return x if self.world == 1 else reduce(x.to(self.device), "sum").to(x.device)

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def gather(self, items: list[T]) -> list[T]:
        """The items of all ranks, rank after rank, the same list on all of them."""
        return items if self.world == 1 else gather_object(items)

    def by_one(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """What says something on the main rank, and nothing on the others."""
        return say if self.main else lambda message: None

    def wait(self) -> None:
        """Returns when every rank has come here."""
        self.state.wait_for_everyone()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this rank's device, its gradients averaged over ranks when there are several."""
        module = module.to(self.device)
        if self.world == 1:
            return module
        return nn.parallel.DistributedDataParallel(
            module, device_ids=[self.device] if self.device.type == "cuda" else None, broadcast_buffers=False
        )

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Keeps gradients local until the `last` backward pass of a minibatch."""
        return module.no_sync() if self.world > 1 and not last else nullcontext()  # type: ignore[operator]


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the wrapper of `Ranks.wrap`."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
