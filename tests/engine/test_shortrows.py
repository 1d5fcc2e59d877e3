"""Attention of short rows against the softmax written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from prefopt.engine import shortrows
from prefopt.engine.forward import Scorer
from prefopt.engine.layout import PLAIN, Paths
from prefopt.engine.shortrows import LONGEST, ShortRows

ROWS, HEADS, TOKENS, WIDTH = 3, 4, 11, 6


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How long the rows were that whole matrices answered."""
    found: list[int] = []
    bias = shortrows._bias
    monkeypatch.setattr(shortrows, "_bias", lambda mask, tokens: found.append(tokens) or bias(mask, tokens))
    return found


def inputs(keys: int = HEADS, tokens: int = TOKENS) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(ROWS, n, tokens, WIDTH, requires_grad=True) for n in (HEADS, keys, keys)]


def mask() -> Tensor:
    """Causal, and in each row some tokens that nobody but themselves sees."""
    visible = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    for row in range(ROWS):
        visible[row, 0, row + 4 :, row + 2] = False
    return visible


def exact(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(shared, 1), value.double().repeat_interleave(shared, 1)
    scores = torch.einsum("rhqd,rhkd->rhqk", q, k) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("rhqk,rhkd->rhqd", weights, v)


@pytest.mark.parametrize("keys", [HEADS, 2, 1])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_slopes_are_those_of_the_formula(keys, masked, scale, calls):
    given = inputs(keys)
    visible = mask() if masked else torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    how = {"attn_mask": mask()} if masked else {"is_causal": True}
    with ShortRows():
        found = scaled_dot_product_attention(*given, **how, scale=scale, enable_gqa=keys != HEADS)
    expected = exact(*given, visible, scale or WIDTH**-0.5)
    weights = torch.randn(found.shape)
    slopes = torch.autograd.grad((found * weights).sum(), given)
    wanted = torch.autograd.grad((expected * weights).sum(), given)
    assert calls == [TOKENS]
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)
    for a, b in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_one_mask_is_made_ready_once(calls):
    visible = mask()
    with ShortRows():
        for _ in range(3):
            scaled_dot_product_attention(*inputs(), attn_mask=visible)
    assert calls == [TOKENS]


def test_masks_that_come_and_go_are_told_apart():
    given = inputs()
    with ShortRows() as mode:
        for hidden in range(5):
            visible = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
            visible[..., 6:, hidden] = False
            found = scaled_dot_product_attention(*given, attn_mask=visible)
            torch.testing.assert_close(found, exact(*given, visible, WIDTH**-0.5).float(), atol=1e-6, rtol=1e-5)
            assert mode.biases[id(visible), TOKENS][0] is visible  # kept, so that no other gets its number


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda x: x.bfloat16(), {"is_causal": True}),
        (lambda x: x, {}),
        (lambda x: x, {"attn_mask": torch.zeros(TOKENS, TOKENS)}),
        (lambda x: x, {"attn_mask": mask().expand(-1, HEADS, -1, -1)}),
        (lambda x: torch.cat([x] * 30, 2), {"is_causal": True}),
        (lambda x: x, {"is_causal": True, "dropout_p": 1.0}),
    ],
    ids=["bfloat16", "no mask", "a mask that adds", "a mask for each head", "long rows", "dropout"],
)
def test_other_calls_are_left_to_pytorch(change, how, calls):
    given = [change(x) for x in inputs()]
    with ShortRows():
        found = scaled_dot_product_attention(*given, **how)
    assert torch.equal(found, scaled_dot_product_attention(*given, **how))
    assert calls == []
    assert 30 * TOKENS > LONGEST


def test_keys_of_other_tokens_are_left_to_pytorch(calls):
    query, key, _ = inputs()
    visible = mask()[:, :, 4:]
    with ShortRows():
        found = scaled_dot_product_attention(query[:, :, 4:], key, key, attn_mask=visible)
    torch.testing.assert_close(found, exact(query[:, :, 4:], key, key, visible, WIDTH**-0.5).float())
    assert calls == []


def test_what_would_be_kept_has_a_bound(calls, monkeypatch):
    monkeypatch.setattr(shortrows, "KEPT_BYTES", 4 * ROWS * HEADS * TOKENS**2 - 1)
    with ShortRows():
        scaled_dot_product_attention(*inputs(), is_causal=True)
    assert calls == []


def test_every_path_but_the_plain_one_takes_it(tiny_model):
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(tiny_model))
    used = {}
    for paths in (PLAIN, Paths("causal"), Paths("shared")):
        scorer.paths = paths
        used[paths.layout] = isinstance(scorer._attention(), ShortRows)
    assert used == {"padded": False, "causal": True, "shared": True}
