"""Fused AdamW, schedules, clipping. The learning rate is a pure function of the number of updates made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prefopt.config import OptimConfig


def learning_rate(config: OptimConfig, update: int, total: int) -> float:
    """The rate of update number `update` (from 0) of `total`: a linear warm-up from 0, then the schedule.

    >>> c = OptimConfig(lr=1.0, schedule="linear", warmup=0.2)
    >>> [round(learning_rate(c, u, 10), 3) for u in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    warm = round(config.warmup * total)
    if update < warm:
        return config.lr * (update + 1) / warm
    progress = (update - warm) / max(total - warm, 1)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.schedule]
    return config.lr * max(shape, config.final_lr)


CRITIC = "critic."
"""What the names of a critic's parameters begin with."""


class Optimizer:
    """AdamW over the named parameters of a module; weight decay on matrices only. The gradients of `lasting`
    parameters are zeroed between steps, all others dropped. The learning rate of a critic is `critic` times that of
    everything else."""

    def __init__(
        self, module: nn.Module, config: OptimConfig, lasting: Sequence[nn.Parameter] = (), critic: float = 1.0
    ) -> None:
        self.config = config
        self.lasting = {id(p) for p in lasting}
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups = [
            {
                "params": [
                    p for n, p in self.named.items() if (p.dim() >= 2, n.startswith(CRITIC)) == (matrix, values)
                ],
                "weight_decay": config.weight_decay if matrix else 0.0,
                "scale": critic if values else 1.0,
            }
            for values in (False, True)
            for matrix in (True, False)
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        # Moments are made before what comes and goes in a step: memory would be left in pieces between them.
        for p in self.named.values():
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            self.adamw.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def clip(self) -> Tensor:
        """Scales the gradients down to the configured norm; returns the norm they had."""
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.named.values() if p.grad is not None)
        limit = self.config.max_grad_norm
        if limit is not None and not limit / (norm + 1e-6) >= 1:  # else it would multiply them all with 1
            torch.nn.utils.clip_grads_with_norm_(self.named.values(), limit, norm)
        return norm

    def step(self, rate: float) -> None:
        """One update with learning rate `rate`."""
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["scale"]
        self.adamw.step()

    def clear(self) -> None:
        """Forgets the gradients."""
        for p in self.named.values():
            if id(p) in self.lasting and p.grad is not None:
                p.grad.zero_()
            else:
                p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the optimizer under `parameter.quantity`."""
        states = ((name, self.adamw.state.get(p, {})) for name, p in self.named.items())
        return {f"{name}.{quantity}": x for name, state in states for quantity, x in state.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned."""
        for key, x in tensors.items():
            name, _, quantity = key.rpartition(".")
            parameter = self.named[name]
            home = parameter.device if x.dim() or parameter.device.type == "cuda" else torch.device("cpu")
            self.adamw.state[parameter][quantity] = x.to(home)
