from __future__ import annotations

import pytest
import torch

from prefopt.config import OptimConfig
from prefopt.engine.optimize import Optimizer, learning_rate


def rates(total: int = 10, **settings) -> list[float]:
    config = OptimConfig(lr=1.0, **settings)
    return [learning_rate(config, update, total) for update in range(total)]


def test_schedules():
    assert rates(schedule="constant") == [1.0] * 10
    assert rates(schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])
    cosine = rates(schedule="cosine")
    assert (cosine[0], cosine[5]) == (1.0, pytest.approx(0.5))
    assert rates(schedule="linear", final_lr=0.35)[-1] == 0.35


def test_warm_up_rises_to_the_peak_and_does_not_start_at_zero():
    assert rates(schedule="constant", warmup=0.4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))


def step(net: torch.nn.Module, optimizer: Optimizer, rate: float = 0.1) -> None:
    net(torch.ones(1, 3)).square().sum().backward()
    optimizer.step(rate)
    optimizer.clear()


def test_weight_decay_touches_matrices_only():
    net = module()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = Optimizer(net, OptimConfig(lr=0.1, weight_decay=0.5))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for name, p in net.named_parameters():
        factor = 0.95 if p.dim() >= 2 else 1.0
        assert torch.allclose(p, before[name] * factor, atol=1e-7), name


def test_clipping_returns_the_norm_and_scales_down_to_the_limit():
    net = module()
    optimizer = Optimizer(net, OptimConfig(max_grad_norm=0.5))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    size = sum(p.numel() for p in net.parameters())
    assert float(optimizer.clip()) == pytest.approx(size**0.5)
    total = sum(float(p.grad.square().sum()) for p in net.parameters())
    assert total**0.5 == pytest.approx(0.5, rel=1e-4)


def test_gradients_within_the_limit_keep_every_bit_and_no_number_spoils_all():
    net = module()
    optimizer = Optimizer(net, OptimConfig(max_grad_norm=100.0))
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.clip()
    assert all(bool((p.grad == torch.tensor(0.1)).all()) for p in net.parameters())
    next(net.parameters()).grad[0] = torch.nan
    assert bool(optimizer.clip().isnan())
    assert all(bool(p.grad.isnan().all()) for p in net.parameters())


def test_no_limit_leaves_gradients_alone():
    net = module()
    for p in net.parameters():
        p.grad = torch.full_like(p, 100.0)
    Optimizer(net, OptimConfig(max_grad_norm=None)).clip()
    assert all(bool((p.grad == 100).all()) for p in net.parameters())


def test_state_goes_to_flat_names_and_back():
    one, two = module(), module()
    first, second = (Optimizer(net, OptimConfig()) for net in (one, two))
    step(one, first)
    two.load_state_dict(one.state_dict())
    state = {name: x.clone() for name, x in first.state().items()}
    assert "0.weight.exp_avg" in state
    second.load(state)
    step(one, first)
    step(two, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_lasting_gradients_are_zeroed_and_others_dropped():
    net = module()
    lasting = net[0].weight
    optimizer = Optimizer(net, OptimConfig(), [lasting])
    lasting.grad = kept = torch.zeros_like(lasting)
    step(net, optimizer)
    assert lasting.grad is kept
    assert not kept.any()
    assert net[0].bias.grad is None


def test_moments_are_there_before_the_first_step_and_are_those_that_pytorch_makes():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    layers[1].load_state_dict(layers[0].state_dict())
    ours = Optimizer(layers[0], OptimConfig(lr=0.1, weight_decay=0.0))
    assert {name: float(x.abs().sum()) for name, x in ours.state().items()} == dict.fromkeys(
        [f"{p}.{of}" for p in ("weight", "bias") for of in ("step", "exp_avg", "exp_avg_sq")], 0.0
    )
    settings = {"lr": 0.1, "betas": ours.config.betas, "eps": ours.config.eps, "weight_decay": 0.0}
    theirs = torch.optim.AdamW(layers[1].parameters(), fused=True, **settings)
    for _ in range(3):
        for layer, step in zip(layers, (lambda: ours.step(0.1), theirs.step), strict=True):
            layer(torch.ones(4, 3)).square().sum().backward()
            step()
    for p, name in ((layers[1].weight, "weight"), (layers[1].bias, "bias")):
        assert torch.equal(p, dict(layers[0].named_parameters())[name])
        for of, x in theirs.state[p].items():
            assert torch.equal(x, ours.state()[f"{name}.{of}"])
            assert x.dtype == ours.state()[f"{name}.{of}"].dtype
