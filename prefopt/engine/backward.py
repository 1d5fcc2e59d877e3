"""Gradients of one minibatch, microbatch by microbatch. Any split gives the same sum: losses divide by global
counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prefopt.batch import Batch, Policy
from prefopt.components import Algorithm
from prefopt.data.assemble import Assembled
from prefopt.engine.columns import Forwarder
from prefopt.engine.plan import Micro
from prefopt.errors import PluginError


def backward(algorithm: Algorithm, forwarder: Forwarder, built: Assembled, gap: bool = False) -> dict[str, float]:
    """Adds the gradient of the minibatch's loss to the parameters; returns its metrics over all ranks. With `gap` one
    of them is how far the sampler's log-probabilities are from ours, as a mean of absolute differences."""
    micros = forwarder.plan(built)
    tokens = sum(map(len, built.tokens))
    forwarder.meter.backward += tokens
    forwarder.meter.forward += tokens if "token_kl" in algorithm.needs().during else 0  # those of the reference
    if algorithm.coupled and (len(micros) > 1 or forwarder.ranks.world > 1):
        return _coupled(algorithm, forwarder, built, micros)
    return _separate(algorithm, forwarder, built, micros, gap)


def _separate(
    algorithm: Algorithm, forwarder: Forwarder, built: Assembled, micros: Sequence[Micro], gap: bool
) -> dict[str, float]:
    totals: dict[str, Tensor] = {}
    for micro in _each(micros, forwarder):
        outputs = forwarder.live(built, micro.index, algorithm.needs().during)
        batch = built.batch.select(micro.index).to(forwarder.ranks.device)
        loss = algorithm.loss(batch, Policy(outputs))
        _differentiate(loss.value, micro, forwarder, algorithm)
        found = {"loss/total": loss.value, **loss.metrics} | (_gap(batch, outputs) if gap else {})
        for name, x in found.items():
            value = torch.zeros((), dtype=torch.double) if micro.idle else x.detach().double().cpu()
            totals[name] = totals.get(name, torch.zeros((), dtype=torch.double)) + value
    values = forwarder.ranks.sum(torch.stack(list(totals.values())))
    return dict(zip(totals, values.tolist(), strict=True))


def _gap(batch: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the sequences that were drawn."""
    if "logps" not in outputs:
        return {}
    off = (outputs["logps"].detach() - batch.sampled_logps).abs() * (batch.sampled_logps != 0)
    return {"sampler/gap": batch.mean(off, "tokens", weighted=False)}


def _coupled(algorithm: Algorithm, forwarder: Forwarder, built: Assembled, micros: Sequence[Micro]) -> dict[str, float]:
    """For a loss that must see the minibatch whole: its gradient by the live outputs, then those replayed in parts."""
    want = algorithm.needs().during
    leaves = {name: x.requires_grad_() for name, x in forwarder.whole(built, want).items()}
    loss = algorithm.loss(built.batch, Policy(leaves))
    _check(loss.value, algorithm)
    slopes = torch.autograd.grad(loss.value, list(leaves.values()), materialize_grads=True)
    named = dict(zip(leaves, slopes, strict=True))
    for micro in _each(micros, forwarder):
        live = forwarder.live(built, micro.index, want)
        rows = torch.tensor(micro.index)
        parts = [(live[name] * _cut(slope[rows], live[name])).sum() for name, slope in named.items()]
        _differentiate(torch.stack(parts).sum(), micro, forwarder, algorithm)
    return {name: x.detach().item() for name, x in {"loss/total": loss.value, **loss.metrics}.items()}


def _cut(x: Tensor, like: Tensor) -> Tensor:
    return x[..., : like.shape[-1]].to(like)


def _each(micros: Sequence[Micro], forwarder: Forwarder) -> Iterator[Micro]:
    """The microbatches; ranks exchange gradients in the last one only."""
    for i, micro in enumerate(micros):
        with forwarder.ranks.accumulating(forwarder.module, last=i == len(micros) - 1):
            yield micro


def _differentiate(value: Tensor, micro: Micro, forwarder: Forwarder, algorithm: Algorithm) -> None:
    _check(value, algorithm)
    scale = 0.0 if micro.idle else float(forwarder.ranks.world)  # ranks average their gradients
    (value * scale).backward()  # type: ignore[no-untyped-call]


def _check(value: Tensor, algorithm: Algorithm) -> None:
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        what = (
            f"shape {tuple(value.shape)}, requires_grad={value.requires_grad}" if isinstance(value, Tensor) else value
        )
        raise PluginError(f"{type(algorithm).__name__}.loss must give a scalar with a gradient; it gave {what}")
