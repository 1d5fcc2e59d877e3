"""Steps by one token a row against products and softmax in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from prefopt.engine import fewrows
from prefopt.engine.fewrows import LEAST, FewRows, Run, few_rows

CPU = torch.device("cpu")
WIDE, HIGH = 96, 1000
needs_packing = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def matrix() -> nn.Parameter:
    assert WIDE * HIGH > LEAST
    return nn.Parameter(numbers(HIGH, WIDE))


@needs_packing
@pytest.mark.parametrize("bias", [None, numbers(HIGH)])
def test_products_are_those_of_the_matrix_while_rows_end(matrix, bias):
    mode = FewRows()
    with torch.no_grad():
        for rows in (7, 6, 4, 3, 1, 9):
            x = numbers(rows, 1, WIDE)
            with mode:
                found = linear(x, matrix, bias)
            exact = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
            torch.testing.assert_close(found, exact.float(), atol=1e-4, rtol=1e-5)
            assert found.shape == (rows, 1, HIGH)


@needs_packing
@torch.no_grad()
def test_a_matrix_is_packed_once(matrix):
    mode, seen = FewRows(), []
    for rows in (8, 8, 5, 1, 40):
        with mode.of((), 0):
            linear(numbers(rows, WIDE), matrix)
        seen.append(mode.packed[id(matrix)][2])
    assert all(x is seen[0] for x in seen)


@needs_packing
@torch.no_grad()
def test_a_matrix_that_has_changed_is_packed_again(matrix):
    mode, x = FewRows(), numbers(3, WIDE)
    for _ in range(2):
        with mode:
            found = linear(x, matrix)
        torch.testing.assert_close(found, x @ matrix.T, atol=1e-4, rtol=1e-5)
        matrix.mul_(2)


@needs_packing
@torch.no_grad()
def test_small_matrices_and_those_that_are_no_parameters_are_not_packed(matrix):
    mode = FewRows()
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
    with FewRows().of([Run(0, n, 0, places)], places):
        found = scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None, None], scale=scale)
    k, v = (x.double().repeat_interleave(heads // keys, 1) for x in (key, value))
    scores = torch.einsum("nhqd,nhkd->nhqk", query.double(), k) * (scale or width**-0.5)
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(found, (weights @ v).float(), atol=1e-6, rtol=1e-5)
    together = query.view(n, keys, heads // keys, width)  # as transformers has it
    with FewRows().of([Run(0, n, 0, places)], places):
        same = scaled_dot_product_attention(together, key, value, attn_mask=visible[:, None, None], scale=scale)
    assert torch.equal(same.view_as(found), found)


@pytest.mark.parametrize("keys", [4, 2])
def test_rows_of_one_prompt_read_what_they_share_once(keys):
    """Of rows 1 .. 3 only the first holds the prompt: what the others hold in its place is never read. A window hides
    a part of it from row 3."""
    n, heads, places, width, shared = 5, 4, 12, 6, 4
    query, key, value = (numbers(n, h, t, width) for h, t in ((heads, 1), (keys, places), (keys, places + 1)))
    value = value[:, :, :places]
    behind = torch.tensor([2, 5, 8, 6, 11])[:, None] - torch.arange(places)
    visible = ((behind >= 0) & (behind < torch.tensor([99, 99, 99, 4, 99])[:, None]))[:, None, None]
    runs = [Run(0, 1, 0, 3), Run(1, 4, shared, 9), Run(4, 5, 0, places)]
    known = [x.clone() for x in (key, value)]
    for x in known:
        x[2:4, :, :shared] = x[1, :, :shared]
    for x in (key, value):
        x[2:4, :, :shared] = torch.nan
    k, v = (x.double().repeat_interleave(heads // keys, 1) for x in known)
    scores = torch.einsum("nhqd,nhkd->nhqk", query.double(), k) * width**-0.5
    exact = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    with FewRows().of(runs, places):
        found = scaled_dot_product_attention(query, key, value, attn_mask=visible)
    torch.testing.assert_close(found, exact.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("rows", "places"), [(4, 7), (3, 8), (2, 7)])
def test_attention_of_other_rows_or_places_is_not_taken_over(rows, places, monkeypatch):
    """Here 3 rows and 7 places are announced."""
    monkeypatch.setattr(fewrows, "_attention", None)
    query, key = numbers(rows, 2, 1, 4), numbers(rows, 2, places, 4)
    mask = torch.ones(rows, 1, 1, places, dtype=torch.bool)
    with FewRows().of([Run(0, 3, 0, 7)], 7):
        found = scaled_dot_product_attention(query, key, key, attn_mask=mask)
    assert found.shape == query.shape


def test_other_devices_and_precisions_go_without():
    assert few_rows(CPU, torch.bfloat16) is None
    assert few_rows(torch.device("meta"), torch.float32) is None
