"""Steps by one token a row against products and softmax in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from prefopt.engine import fewrows
from prefopt.engine.fewrows import LEAST, FewRows, few_rows

CPU = torch.device("cpu")
WIDE, HIGH = 96, 1000
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch is without MKL")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def matrix() -> nn.Parameter:
    assert WIDE * HIGH > LEAST
    return nn.Parameter(numbers(HIGH, WIDE))


@needs_mkl
@pytest.mark.parametrize("bias", [None, numbers(HIGH)])
def test_products_are_those_of_the_matrix_while_rows_end(matrix, bias):
    mode = FewRows()
    with torch.no_grad():
        for rows in (7, 6, 4, 3, 1, 9):
            x = numbers(rows, 1, WIDE)
            with mode.of(rows):
                found = linear(x, matrix, bias)
            exact = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
            torch.testing.assert_close(found, exact.float(), atol=1e-4, rtol=1e-5)
            assert found.shape == (rows, 1, HIGH)


@needs_mkl
@torch.no_grad()
def test_a_matrix_is_packed_once_until_half_of_the_rows_are_left(matrix):
    mode = FewRows()
    seen = []
    for rows in (8, 8, 5, 4, 3):
        with mode.of(rows):
            linear(numbers(rows, WIDE), matrix)
        seen.append((mode.rows, id(mode.packed[id(matrix)][2])))
    assert [size for size, _ in seen] == [8, 8, 8, 4, 4]
    assert len({place for _, place in seen[:3]}) == len({place for _, place in seen[3:]}) == 1


@needs_mkl
@torch.no_grad()
def test_a_matrix_that_has_changed_is_packed_again(matrix):
    mode, x = FewRows().of(3), numbers(3, WIDE)
    for _ in range(2):
        with mode:
            found = linear(x, matrix)
        torch.testing.assert_close(found, x @ matrix.T, atol=1e-4, rtol=1e-5)
        matrix.mul_(2)


@needs_mkl
@torch.no_grad()
def test_small_matrices_and_those_that_are_no_parameters_are_not_packed(matrix):
    mode = FewRows().of(3)
    for other in (nn.Parameter(numbers(5, WIDE)), matrix.clone(), nn.Parameter(matrix.double())):
        x = numbers(3, WIDE).to(other.dtype)
        with mode:
            assert torch.equal(linear(x, other), x @ other.T)
    assert mode.packed == {}


@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_of_one_token_a_row_is_that_of_the_formula(keys, scale, monkeypatch):
    n, heads, places, width = 3, 4, 9, 6
    query, key, value = (
        numbers(n, heads, 1, width),
        numbers(n, keys, places, width),
        numbers(n, keys, places + 1, width),
    )
    value = value[:, :, :places]
    visible = torch.arange(places) <= torch.tensor([2, 8, 5])[:, None]
    monkeypatch.setattr(fewrows, "linear", None)
    with FewRows().of(n):
        found = scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None, None], scale=scale)
    k, v = (x.double().repeat_interleave(heads // keys, 1) for x in (key, value))
    scores = torch.einsum("nhqd,nhkd->nhqk", query.double(), k) * (scale or width**-0.5)
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(found, (weights @ v).float(), atol=1e-6, rtol=1e-5)
    together = query.view(n, keys, heads // keys, width)  # as transformers has it
    with FewRows().of(n):
        same = scaled_dot_product_attention(together, key, value, attn_mask=visible[:, None, None], scale=scale)
    assert torch.equal(same.view_as(found), found)


def test_other_devices_and_precisions_go_without():
    assert not isinstance(few_rows(CPU, torch.bfloat16)(3), FewRows)
    assert not isinstance(few_rows(torch.device("meta"), torch.float32)(3), FewRows)
