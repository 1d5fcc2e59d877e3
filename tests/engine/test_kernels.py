"""Kernels against formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prefopt.engine import fewrows, kernels, pages
from prefopt.engine.fewrows import Step
from prefopt.engine.kernels import Panels, attend
from prefopt.engine.pages import Groups, Sharing
from prefopt.engine.shortrows import Asked

PROMPTS = [(2,), (3, 1), (), (3,), (3, 1), (4, 0, 2)]
"""Pages of prompts: of them 3 begins two, and 2 is in two places."""
ROOM = 21


@pytest.fixture
def compilings(monkeypatch):
    """What was compiled while the test ran, or before."""
    found = []
    compiled = kernels._attention_kernel
    monkeypatch.setattr(kernels, "_attention_kernel", lambda *told: (found.append(told), compiled(*told))[1])
    return found


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def asked(rows: list[tuple[int, ...]], own: list[int], heads: tuple[int, int], size: int, hidden: int, scale=None):
    """What rows with these pages ask. They do not see that many tokens at the beginning of their prompts, and of what
    is their own but for the last, nor some rows the last of their prompts. What belongs to nobody is no number."""
    n, kinds, longest, width = len(rows), heads[1], pages.PAGE * max(map(len, rows)), max(own)
    keys, values = (numbers(n + i, kinds, ROOM, size)[:n] for i in range(2))
    prompts = numbers(5, kinds, size, pages.PAGE), numbers(5, kinds, pages.PAGE, size)
    seen = torch.zeros(n, longest + width, dtype=torch.bool)
    for i, numbers_ in enumerate(rows):
        seen[i, hidden : max(0, pages.PAGE * len(numbers_) - i % 2)] = True
        seen[i, longest + min(hidden, own[i] - 1) : longest + own[i]] = True
        keys[i, :, own[i] :] = values[i, :, own[i] :] = torch.nan
    query = numbers(heads[0], n, 1, size).transpose(0, 1)
    assert n == 1 or not query.is_contiguous()
    told = Asked(query, keys[:, :, :width], values[:, :, :width], seen[:, None, None], 0.0, False, scale)
    step = Step(Sharing(rows), own)
    step.prompts = prompts
    return told, step


def by_the_formula(told: Asked, step: Step) -> torch.Tensor:
    """Row by row, in float64."""
    found = []
    for i, (numbers_, own) in enumerate(zip(step.sharing.rows, step.own, strict=True)):
        prompts = [step.prompts[0].transpose(2, 3), step.prompts[1]]
        before = [x[list(numbers_)].transpose(0, 1).flatten(1, 2) for x in prompts]
        after = [x[i, :, :own] for x in (told.key, told.value)]
        k, v = (torch.cat(pair, 1).double() for pair in zip(before, after, strict=True))
        seen = told.attn_mask[i, 0, 0]
        seen = torch.cat([seen[: before[0].shape[1]], seen[step.longest : step.longest + own]])
        query = told.query[i].double().view(len(k), -1, k.shape[-1])
        scores = query @ k.transpose(1, 2) * told.factor
        found.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).flatten(0, 1))
    return torch.stack(found)[:, :, None].float()


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("size", "page"), [(64, 32), (80, 32), (6, 3)])
def test_rows_see_their_pages_and_their_own_tokens(size, page, heads, hidden, monkeypatch, compilings, threads):
    """Sizes of heads that a processor takes several numbers of at a time, and not; groups of four queries, and of what
    is left; every row alone, and rows together."""
    for module in (fewrows, kernels, pages):
        monkeypatch.setattr(module, "PAGE", page)
    rows = [PROMPTS[i % 6] for i in range(19)] + [PROMPTS[1]] * 20
    told, step = asked(rows, [1 + i % ROOM for i in range(39)], heads, size, hidden, 0.3 if hidden else None)
    found = attend(told, step)
    torch.testing.assert_close(found, by_the_formula(told, step), atol=5e-6, rtol=1e-5)
    assert compilings == [(size, page)]
    alone, step = asked([()], [5], heads, size, 0)
    torch.testing.assert_close(attend(alone, step), by_the_formula(alone, step), atol=2e-6, rtol=1e-5)


def test_a_page_of_what_is_no_number_spoils_its_own_rows_alone():
    told, step = asked(PROMPTS, [3] * 6, (2, 2), 64, 0)
    step.prompts[1][3] = torch.nan
    spoilt = attend(told, step).isnan()
    assert spoilt.flatten(1).any(1).tolist() == [False, True, False, True, True, False]
    step.prompts[0][2] = torch.nan
    assert attend(told, step).isnan().flatten(1).all(1).tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("kind", ["of two sizes", "in another order"])
def test_keys_and_values_that_lie_otherwise_are_left_to_attention_written_out(kind, compilings):
    told, step = asked([()] * 3, [4] * 3, (2, 2), 8, 0)
    key, value = told.key.contiguous(), told.value.contiguous()
    if kind == "of two sizes":
        value = numbers(3, 2, 4, 9)
    else:
        key, value = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (key, value))
    told = told._replace(key=key, value=value)
    assert torch.equal(attend(told, step), fewrows.attention(told, step))
    assert compilings == []


def test_rows_with_the_same_pages_are_a_group_of_no_more_than_sixteen():
    groups = Groups.of([(1, 2)] * 17 + [()] + [(1,)] * 2)
    found = {name: x.tolist() for name, x in groups._asdict().items()}
    assert found["rows"] == list(range(20))
    assert found["row_starts"] == [0, 16, 17, 18, 20]
    assert found["pages"] == [1, 2, 1, 2, 1]
    assert found["page_starts"] == [0, 2, 4, 4, 5]
    assert {x.dtype for x in groups} == {torch.int32}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("wide", "high", "rows"),
    [(96, (40, 8, 16), 1), (37, (10, 3), 5), (5, (1,), 3), (16, (2, 70), 13), (2100, (33,), 30)],
)
@torch.no_grad()
def test_products_are_those_of_the_formula(wide, high, rows, bias, threads):
    """Of several layers side by side; of numbers that a processor takes several of at a time, and not; of rows that
    need several passes, and of a panel in several blocks. To a few millionths of what is summed."""
    torch.manual_seed(0)
    layers = [nn.Linear(wide, size, bias) for size in high]
    for i, layer in enumerate(layers):
        layer.weight.copy_(numbers(len(layer.weight), wide + i)[:, :wide])
    layers[-1].weight = nn.Parameter(layers[-1].weight.T.contiguous().T)  # in another order
    product = Panels(layers)
    product.ready()
    given = numbers(rows, 1, wide + 1)[..., 1:]
    for x in (given, given[:0]):
        found = product.whole(x)
        exact = [x.double() @ layer.weight.double().T + (layer.bias if bias else 0) for layer in layers]
        summed = [x.abs() @ layer.weight.abs().T + 1 for layer in layers]
        assert ((found - torch.cat(exact, -1)).abs() <= 3e-6 * torch.cat(summed, -1)).all()
        assert found.is_contiguous()


@torch.no_grad()
def test_a_product_of_rows_of_another_size_or_precision_is_refused():
    product = Panels([nn.Linear(8, 8)])
    product.ready()
    for x in (numbers(2, 9), numbers(2, 8).double()):
        with pytest.raises(RuntimeError, match="do not fit the matrix"):
            product.whole(x)
