"""Steps by one token a row against products and softmax in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prefopt.engine import fewrows
from prefopt.engine import pages as pages_
from prefopt.engine.fewrows import LEAST, NAME, FewRows, Step, able
from prefopt.engine.pages import Sharing

WIDE, HIGH = 96, 1000
needs_packing = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Network(nn.Module):
    """Some layers, and a configuration as transformers has it."""

    def __init__(self, *layers: nn.Module, attention: str = "sdpa") -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.text = SimpleNamespace(_attn_implementation=attention)
        self.config = SimpleNamespace(get_text_config=lambda: self.text)
        self.vectors = nn.Embedding(3, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.vectors


def linear(high: int = HIGH, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(WIDE, high, bias)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(numbers(*p.shape))
    return layer


def exact(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = 0 if layer.bias is None else layer.bias.double()
    return (x.double() @ layer.weight.double().T + bias).float()


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@needs_packing
@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_matrix_while_rows_end(bias):
    layer = linear(bias=bias)
    mode = FewRows(Network(layer))
    for rows in (7, 6, 4, 3, 1, 9):
        x = numbers(rows, 1, WIDE)
        with mode:
            found = layer(x)
        near(found, exact(layer, x))
        assert found.shape == (rows, 1, HIGH)


@needs_packing
@torch.no_grad()
def test_layers_that_are_given_the_same_input_one_after_the_other_are_one_product():
    """The fourth is given it later, the fifth has a bias, the last is called twice."""
    layers = [
        linear(high, bias) for high, bias in ((700, False), (800, False), (900, False), (1000, False), (700, True))
    ]
    mode = FewRows(Network(*layers))
    a, b, c, d, e = layers
    for rows in (4, 2, 5):
        x, y = numbers(rows, WIDE), numbers(rows + 1, WIDE)
        with mode:
            found = [(a, x, a(x)), (b, x, b(x)), (c, y, c(y)), (d, x, d(x)), (e, x, e(x)), (e, y, e(y))]
        for layer, given, output in found:
            near(output, exact(layer, given))
            assert output.is_contiguous()
        assert [product.layers for product in mode.products] == [[a, b], [c], [d], [e]]
        assert all(product.input is None for product in mode.products)


@needs_packing
@torch.no_grad()
def test_layers_of_one_product_may_be_given_other_inputs_later():
    a, b = linear(), linear(800)
    mode, x, y = FewRows(Network(a, b)), numbers(3, WIDE), numbers(4, WIDE)
    with mode:
        _ = a(x), b(x)
    with mode:
        near(a(x), exact(a, x))
        near(b(y), exact(b, y))
        near(b(x), exact(b, x))
    with mode:
        first = a(x)
        x += 1  # the same memory with other numbers
        near(a(x), exact(a, x))
        near(first, exact(a, x - 1))


@needs_packing
@torch.no_grad()
def test_a_matrix_is_packed_once_and_again_when_it_has_changed():
    a, b = linear(), linear(800)
    mode, x, seen = FewRows(Network(a, b)), numbers(3, WIDE), []
    for step in range(6):
        if step == 4:
            b.weight.mul_(2)
        if step == 5:
            a.weight = nn.Parameter(a.weight + 1)
        with mode:
            near(a(x), exact(a, x))
            near(b(x), exact(b, x))
        seen.append([product.packed for product in mode.products])
    packed = [x[0] for x in seen[1:]]
    assert seen[0] == [None]
    assert [x is packed[0] for x in packed] == [True, True, True, False, False]


@needs_packing
@torch.no_grad()
def test_layers_are_themselves_again_afterwards():
    layer = linear()
    x, network, told = numbers(3, WIDE), Network(layer), []
    mode = FewRows(network)

    def fails():
        with mode.of(Step(Sharing([()]), [1])):
            layer(x)
            told.append(network.text._attn_implementation)
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
        assert "forward" not in vars(layer)
        assert network.text._attn_implementation == "sdpa"
    assert told == [NAME, NAME]
    assert torch.equal(layer(x), x @ layer.weight.T)


@needs_packing
@torch.no_grad()
def test_a_matrix_that_cannot_be_packed_leaves_nothing_behind(monkeypatch):
    layer = linear()
    network, x = Network(layer), numbers(3, WIDE)
    mode = FewRows(network)
    with mode:
        layer(x)
    monkeypatch.setattr(mode.products[0], "ready", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), mode.of(Step(Sharing([()]), [1])):
        raise AssertionError
    assert "forward" not in vars(layer)
    assert network.text._attn_implementation == "sdpa"
    assert fewrows._step.get() is None


@needs_packing
def test_what_something_is_derived_from_is_left_to_pytorch():
    layer = linear()
    mode, x = FewRows(Network(layer)), numbers(3, WIDE)
    for grad in (False, False, True):
        with torch.set_grad_enabled(grad), mode:
            found = layer(x)
    found.sum().backward()
    near(layer.weight.grad[0], x.sum(0))


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@needs_packing
@torch.no_grad()
def test_small_and_other_layers_are_let_alone():
    hooked = linear()
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    others = [
        nn.Linear(WIDE, 5),
        linear().double(),
        Own(WIDE, HIGH),
        hooked,
        nn.utils.parametrizations.weight_norm(linear()),
    ]
    assert WIDE * 5 < LEAST < WIDE * HIGH
    mode = FewRows(Network(*others))
    assert mode.layers == []
    for layer in others:
        x = numbers(3, WIDE).to(next(layer.parameters()).dtype)
        expected = layer(x)
        for _ in range(2):
            with mode:
                assert torch.equal(layer(x), expected)


def test_without_a_step_attention_is_that_of_the_model():
    network = Network(attention="eager")
    with FewRows(network):
        assert network.text._attn_implementation == "eager"


def attend(query, key, value, mask, step, prompts=(), **more):
    with torch.no_grad(), FewRows(Network()).of(step):
        step.prompts = prompts
        return fewrows._attend(nn.Module(), query, key, value, mask, **more)[0].transpose(1, 2)


def attention(query, key, value, visible, scale):
    """By the formula, in float64. Queries [n, H, 1, D], keys and values [n, K, T, D]."""
    k, v = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("nhqd,nhkd->nhqk", query.double(), k) * scale
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).float()


@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_of_one_token_a_row_is_that_of_the_formula(keys, scale, monkeypatch):
    n, heads, width, size = 3, 4, 9, 6
    query, key, value = numbers(n, heads, 1, size), numbers(n, keys, width, size), numbers(n, keys, width, size + 1)
    visible = (torch.arange(width) <= torch.tensor([2, 8, 5])[:, None])[:, None, None]
    monkeypatch.setattr(fewrows, "ALL_ATTENTION_FUNCTIONS", None)
    found = attend(query, key, value, visible, Step(Sharing([()] * n), [width] * n), scaling=scale)
    expected = attention(query, key, value, visible, scale or size**-0.5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("skew", [4, 1])
@pytest.mark.parametrize("keys", [4, 2])
def test_rows_that_share_pages_of_a_prompt_read_them_there(keys, skew, monkeypatch):
    """Nobody has page 0. Row 0 has page 2 with three tokens, rows 1 and 4 have pages 3 and 1, of which a window hides
    some from row 4, row 3 begins with a part of page 3, and row 2 has no prompt. Page 3 has more rows than the mean of
    two."""
    monkeypatch.setattr(pages_, "SKEW", skew)
    for module in (fewrows, pages_):
        monkeypatch.setattr(module, "PAGE", 4)
    pages, rows, heads, size, longest, width = [(2,), (3, 1), (), (3,), (3, 1)], 5, 4, 6, 8, 3
    query = numbers(rows, heads, 1, size)
    own = [numbers(rows, keys, width + i, size + i)[:, :, :width] for i in range(2)]
    prompts = [numbers(5, keys, 4, size + i) for i in range(2)]
    seen = torch.zeros(rows, longest, dtype=torch.bool)
    seen[0, :3] = seen[1] = seen[3, :2] = seen[4, 3:6] = True
    after = torch.arange(width) <= torch.tensor([0, 2, 1, 2, 1])[:, None]
    visible = torch.cat([seen, after], 1)[:, None, None]
    begun = [torch.stack([p[[*numbers, 0, 0][:2]].transpose(0, 1).flatten(1, 2) for numbers in pages]) for p in prompts]
    whole = [torch.cat(pair, 2) for pair in zip(begun, own, strict=True)]
    step = Step(Sharing(pages), [width] * rows)
    found = attend(query, *own, visible, step, [prompts[0].transpose(2, 3), prompts[1]])
    torch.testing.assert_close(found, attention(query, *whole, visible, size**-0.5), atol=1e-6, rtol=1e-5)
    (orders,) = step.sharing.known.values()
    assert (orders.pages is None) == (skew == 4)
    assert skew == 4 or orders.pages.tolist() == [1, 2, 3, 3]
    assert len(orders.rows) == keys * 4 * (3 if skew == 4 else 2)  # four readings, each with as many rows as any


class Module(nn.Module):
    is_causal, num_key_value_groups = True, 1


@pytest.mark.parametrize(
    ("rows", "width", "tokens", "more"),
    [
        (4, 7, 1, {}),
        (3, 8, 1, {}),
        (2, 7, 1, {}),
        (3, 7, 2, {}),
        (3, 7, 1, {"position_bias": 0.0}),
        (3, 7, 1, {"dtype": torch.float64}),
    ],
)
def test_attention_of_other_rows_or_tokens_is_not_taken_over(rows, width, tokens, more, monkeypatch):
    """Here 3 rows with 7 tokens of their own are announced, in float32."""
    monkeypatch.setattr(fewrows, "attention", None)
    more = {**more}
    dtype = more.pop("dtype", torch.float32)
    query, key = (numbers(rows, 2, size, 4).to(dtype) for size in (tokens, width))
    mask = torch.ones(rows, 1, tokens, width, dtype=torch.bool)
    given = {name: torch.zeros(rows, 2, tokens, width) for name in more}
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key)
    with torch.no_grad(), FewRows(Network()).of(Step(Sharing([()] * 3), [7] * 3)):
        found = fewrows._attend(Module(), query, key, key, mask, **given)[0]
    torch.testing.assert_close(found.transpose(1, 2), expected)
    assert fewrows._step.get() is None


def test_attention_outside_a_step_is_that_of_pytorch(monkeypatch):
    monkeypatch.setattr(fewrows, "attention", None)
    query, key = numbers(3, 2, 5, 4), numbers(3, 2, 5, 4).flip(0)
    found = fewrows._attend(Module(), query, key, key, None)[0].transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True)
    torch.testing.assert_close(found, expected)


def test_other_devices_and_precisions_go_without():
    assert not able(Network().to(torch.bfloat16))
    assert not able(Network().to("meta"))
