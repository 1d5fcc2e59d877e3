from __future__ import annotations

import math

import pytest
import torch

from prefopt.maths import log1mexp, stop_gradient
from prefopt.maths.constants import holding


def test_a_constant_has_no_gradient():
    x = torch.tensor(3.0, requires_grad=True)
    (stop_gradient(x) * x).backward()
    assert x.grad == 3


def test_held_constants_stay_what_they_were_in_the_order_of_calls():
    kept: list[torch.Tensor] = []
    with holding(kept):
        first, second = (stop_gradient(torch.tensor(x)) for x in (1.0, 2.0))
    assert [first, second] == kept
    with holding(kept):
        assert [stop_gradient(torch.tensor(9.0)).item() for _ in range(2)] == [1.0, 2.0]
    assert stop_gradient(torch.tensor(9.0)) == 9


@pytest.mark.parametrize("x", [-1e-12, -1e-3, -0.5, -math.log(2), -1.0, -30.0, -700.0])
def test_log1mexp_is_accurate_at_both_ends(x):
    expected = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    found = log1mexp(torch.tensor(x, dtype=torch.double, requires_grad=True))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()


def test_log1mexp_of_a_certainty_is_finite_and_so_is_its_gradient():
    for dtype in (torch.float32, torch.double):
        x = torch.tensor([0.0, -1e-30], dtype=dtype, requires_grad=True)
        found = log1mexp(x)
        found.sum().backward()
        assert found.isfinite().all()
        assert x.grad.tolist() == [0, 0]
