"""The tiled head against autograd through whole logits, in float64."""

from __future__ import annotations

import json
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from prefopt.engine.linear import Head, Shape, linear_kl, linear_logps

SHAPES = [Shape(), Shape(temperature=0.7), Shape(scale=2.0, softcap=3.0, temperature=1.3)]


def inputs(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(13, 8), (31, 8), *([(31,)] if bias else [])]
    made = [torch.randn(size, generator=draw, dtype=dtype).requires_grad_() for size in sizes]
    return made, torch.randint(31, (13,), generator=draw)


def every_logp(made: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    hidden, weight, *bias = made
    x = (hidden @ weight.T + (bias[0] if bias else 0.0)) * shape.scale
    x = x if shape.softcap is None else shape.softcap * torch.tanh(x / shape.softcap)
    return torch.log_softmax(x / shape.temperature, -1)


def by_autograd(made: list[torch.Tensor], targets: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    logps = every_logp(made, shape)
    return logps.gather(1, targets[:, None]).squeeze(1), -(logps.exp() * logps).sum(1)


@pytest.mark.parametrize("tile_bytes", [1, 3000, 1 << 20], ids=["one row", "some rows", "all rows"])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 12, 1 << 20], ids=["keeps none", "keeps some", "keeps all"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_are_those_of_whole_logits(entropy, bias, shape, keep_bytes, tile_bytes):
    made, targets = inputs(bias)
    by_logps, by_entropy = torch.linspace(-1, 2, 13).double(), torch.linspace(3, -2, 13).double()
    scores = linear_logps(
        made[0], made[1], targets, *made[2:], shape=shape, entropy=entropy, keep_bytes=keep_bytes, tile_bytes=tile_bytes
    )
    logps, whole = by_autograd(made, targets, shape)
    assert torch.allclose(scores.logps, logps, atol=1e-12)
    found, expected = (scores.logps * by_logps).sum(), (logps * by_logps).sum()
    if entropy:
        assert torch.allclose(scores.entropy, whole, atol=1e-12)
        found, expected = found + (scores.entropy * by_entropy).sum(), expected + (whole * by_entropy).sum()
    pairs = zip(torch.autograd.grad(found, made), torch.autograd.grad(expected, made), strict=True)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in pairs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_may_compute_the_product(bias, shape):
    """It is asked tile by tile, for nothing but the product."""
    made, targets = inputs(bias)
    asked = []

    def layer(states: torch.Tensor) -> torch.Tensor:
        asked.append(len(states))
        return states @ made[1].T + (made[2] if bias else 0.0)

    with torch.no_grad():
        scores = linear_logps(
            made[0], made[1] * torch.nan, targets, *made[2:], shape=shape, tile_bytes=1200, layer=layer
        )
    assert torch.allclose(scores.logps, by_autograd(made, targets, shape)[0], atol=1e-12)
    assert asked == [4, 4, 4, 1]


def test_half_precision_states_are_summed_in_float32():
    (hidden, weight), targets = inputs(bias=False, dtype=torch.bfloat16)
    scores = linear_logps(hidden, weight, targets)
    exact, _ = by_autograd([hidden.double(), weight.double()], targets, Shape())
    assert scores.logps.dtype == torch.float32
    assert torch.allclose(scores.logps.double(), exact, atol=1e-5)
    scores.logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_a_frozen_matrix_gets_no_gradient():
    (hidden, weight), targets = inputs(bias=False)
    linear_logps(hidden, weight.detach(), targets).logps.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_nothing_is_kept_where_no_gradient_is_wanted():
    (hidden, weight), targets = inputs(bias=False)
    with torch.no_grad():
        scores = linear_logps(hidden, weight, targets)
    assert not scores.logps.requires_grad


@pytest.mark.parametrize("tile_bytes", [1, 3000, 1 << 20], ids=["one row", "some rows", "all rows"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_divergence_from_a_reference_is_that_of_whole_distributions(bias, shape, tile_bytes):
    made, _ = inputs(bias)
    torch.manual_seed(1)
    others = [x.detach() + 0.3 * torch.randn_like(x) for x in made]
    heads = [Head(x[1], x[2] if bias else None, shape) for x in (made, others)]
    found = linear_kl(made[0], heads[0], others[0], heads[1], tile_bytes=tile_bytes)
    p, q = (every_logp(x, shape) for x in (made, others))
    expected = torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(1)
    assert torch.allclose(found, expected, atol=1e-12)
    assert float(expected.detach().max()) > 0.1
    weights = torch.linspace(-1, 2, 13).double()
    pairs = [torch.autograd.grad((x * weights).sum(), made) for x in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(*pairs, strict=True))


def test_the_gradient_of_the_matrix_is_added_where_it_lies():
    made, targets = inputs(bias=False)
    others = [x.detach() + 1 for x in made]
    expected = torch.autograd.grad(linear_logps(*made, targets).logps.sum(), made)[1]
    into = torch.ones_like(made[1])
    linear_logps(*made, targets, into=into).logps.sum().backward()
    assert torch.allclose(into, 1 + expected, atol=1e-12)
    head = Head(made[1])
    by_kl = torch.autograd.grad(linear_kl(made[0], head, others[0], Head(others[1])).sum(), made)[1]
    linear_kl(made[0], head, others[0], Head(others[1]), into=into).sum().backward()
    assert torch.allclose(into, 1 + expected + by_kl, atol=1e-12)
    assert made[1].grad is None


@pytest.mark.parametrize(("kept", "entropy", "held"), [(0, False, 1), (2, False, 3), (8, False, 8), (2, True, 5)])
def test_beside_what_is_kept_there_is_one_tile(kept, entropy, held, tmp_path):
    """Of eight tiles; the entropy's slope needs two more. Counted allocation by allocation."""
    made = [torch.randn(size).requires_grad_() for size in ((64, 4), (8192, 4))]
    targets, tile = torch.randint(8192, (64,)), 8 * 8192 * 4
    into = torch.zeros_like(made[1])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        settings = {"entropy": entropy, "keep_bytes": kept * tile, "tile_bytes": tile, "into": into}
        sum(x.sum() for x in linear_logps(*made, targets, **settings)[:2]).backward()
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    assert held * tile <= max(accumulate(change for _, change in changes)) < (held + 0.5) * tile


def test_products_that_are_known_stand_in_for_the_matrix_and_nothing_is_kept():
    """Those of other states here, so that it shows where they are used: tile by tile, forward and backward."""
    draw = torch.Generator().manual_seed(0)
    hidden, other, weight = (torch.randn(*size, generator=draw) for size in ((6, 4), (6, 4), (5, 4)))
    targets, slope = torch.tensor([0, 1, 2, 3, 4, 0]), torch.randn(6, generator=draw)
    asked: list[slice] = []

    def known(part: slice) -> torch.Tensor:
        asked.append(part)
        return other[part] @ weight.T

    hidden.requires_grad_()
    logps = linear_logps(hidden, weight, targets, known=known, tile_bytes=2 * 5 * 4).logps
    expected = torch.log_softmax(other.double() @ weight.double().T, -1)
    torch.testing.assert_close(logps.double(), expected.gather(1, targets[:, None]).squeeze(1))
    (found,) = torch.autograd.grad(logps, hidden, slope)
    by_logits = slope[:, None] * (torch.eye(5)[targets] - expected.exp())
    torch.testing.assert_close(found, (by_logits @ weight.double()).float())
    assert asked == 2 * [slice(0, 2), slice(2, 4), slice(4, 6)]
