"""From logits to what a loss needs. The plain path: whole logits, in float32. It stays as the oracle of faster ones."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logps(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) under softmax(logits / temperature), computed in float32. [..., V], [...] -> [...]."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, targets[..., None]).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`-Σ p log p` of softmax(logits / temperature), in nats. [..., V] -> [...]."""
    logps = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logps.exp() * logps).sum(-1)


@torch.no_grad()
def token_collision_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`-log Σ p²` of softmax(logits / temperature), in nats. [..., V] -> [...]."""
    return -torch.logsumexp(2 * torch.log_softmax(logits.float() / temperature, dim=-1), dim=-1)


def token_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """`KL(reference || policy)` from the logits of both, in nats. [..., V], [..., V] -> [...]."""
    theirs = torch.log_softmax(reference.float(), dim=-1)
    return (theirs.exp() * (theirs - torch.log_softmax(logits.float(), dim=-1))).sum(-1)
