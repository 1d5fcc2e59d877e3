"""Attention over rows that branch, against the softmax written out in float64 under the mask of the layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from prefopt.data.render import Tokens
from prefopt.engine import branches, shortrows
from prefopt.engine.branches import Tree, branched, trees
from prefopt.engine.forward import Scorer, run
from prefopt.engine.layout import PLAIN, Paths, tree_mask
from prefopt.engine.shortrows import ShortRows

HEADS, WIDTH = 4, 6
ROWS = [(5, (3, 1, 4, 2, 3)), (2, (4, 4, 4, 4)), (9, (1, 2, 3, 1, 2)), (18, ())]
"""The length of a beginning, and those of its branches; 18 tokens each, in one row without branches."""


def mask(rows: list[tuple[int, tuple[int, ...]]], window: int | None = None) -> Tensor:
    branch = [[0] * start + [k for k, n in enumerate(sizes, 1) for _ in range(n)] for start, sizes in rows]
    places = [[*range(start)] + [start + i for n in sizes for i in range(n)] for start, sizes in rows]
    return tree_mask(torch.tensor(branch), torch.tensor(places), window)


def inputs(keys: int = HEADS) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(len(ROWS), n, 18, WIDTH, requires_grad=True) for n in (HEADS, keys, keys)]


def exact(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(shared, 1), value.double().repeat_interleave(shared, 1)
    weights = (torch.einsum("rhqd,rhkd->rhqk", q, k) * scale).masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("rhqk,rhkd->rhqd", weights, v)


@pytest.mark.parametrize("keys", [HEADS, 2, 1])
@pytest.mark.parametrize("scale", [WIDTH**-0.5, 0.3])
def test_values_and_slopes_are_those_of_the_formula(keys, scale):
    given, visible = inputs(keys), mask(ROWS)
    found = branched(*given, [tree for row in visible[:, 0] if (tree := Tree.of(row))], scale)
    expected = exact(*given, visible, scale)
    weights = torch.randn(found.shape)
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)
    slopes = torch.autograd.grad((found * weights).sum(), given)
    wanted = torch.autograd.grad((expected * weights).sum(), given)
    for a, b in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_a_tree_is_read_off_its_mask():
    found = [Tree.of(row) for row in mask(ROWS)[:, 0]]
    branching = [Tree(5, (8, 9, 13, 15, 18)), Tree(2, (6, 10, 14, 18)), Tree(9, (10, 12, 15, 16, 18))]
    assert found == [*branching, Tree(18, (18,))]
    for tree, row in zip(found, mask(ROWS)[:, 0], strict=True):
        assert torch.equal(tree.mask, row)


def other_masks() -> dict[str, Tensor]:
    hole, later = mask(ROWS)[0, 0].clone(), mask(ROWS)[0, 0].clone()
    hole[16, 2], later[3, 4] = False, True
    return {
        "a window": mask(ROWS, window=4)[0, 0],
        "a hole": hole,
        "what comes later": later,
        "no beginning": mask([(0, (9, 9))])[0, 0],
    }


@pytest.mark.parametrize("name", other_masks())
def test_another_mask_is_no_tree(name):
    assert Tree.of(other_masks()[name]) is None


def test_rows_are_taken_together_where_it_is_worth_it():
    many, two, none = mask([(4, (2,) * 7)]), mask([(8, (5, 5))]), mask([(18, ())])
    assert trees(many) == (Tree(4, tuple(range(6, 19, 2))),)
    assert trees(two) == trees(none) == ()
    assert trees(torch.cat([many, many, none])) == () != trees(torch.cat([many, many, many, two]))
    assert trees(torch.cat([many, other_masks()["a hole"][None, None]])) == ()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many rows each call had that went by branches."""
    found: list[int] = []
    monkeypatch.setattr(
        shortrows, "branched", lambda q, k, v, rows, s: found.append(len(rows)) or branched(q, k, v, rows, s)
    )
    return found


def test_attention_goes_by_branches_where_they_are_many(calls):
    given, visible = inputs(), mask([(4, (2,) * 7)] * len(ROWS))
    with ShortRows():
        for _ in range(2):
            found = scaled_dot_product_attention(*given, attn_mask=visible)
        scaled_dot_product_attention(*given, is_causal=True)
    torch.testing.assert_close(found, exact(*given, visible, WIDTH**-0.5).float(), atol=1e-6, rtol=1e-5)
    assert calls == [len(ROWS)] * 2


def test_what_would_be_kept_has_a_bound(calls, monkeypatch):
    visible = mask([(4, (2,) * 7)] * len(ROWS))
    needed = 4 * HEADS * sum(tree.weights for tree in trees(visible))
    for bound in (needed, needed - 1):
        monkeypatch.setattr(shortrows, "KEPT_BYTES", bound)
        with ShortRows():
            scaled_dot_product_attention(*inputs(), attn_mask=visible)
    assert calls == [len(ROWS)]


def test_a_group_of_samples_has_the_gradient_of_the_plain_path(tiny_model, calls):
    tokens = [Tokens(tuple(range(3, 12)), tuple((3 + 5 * i + k) % 20 for k in range(2 + i % 3))) for i in range(8)]
    found = []
    for paths in (PLAIN, Paths("shared")):
        scorer = Scorer(AutoModelForCausalLM.from_pretrained(tiny_model))
        scorer.paths = paths
        logps = run(scorer, tokens, ("logps",), torch.device("cpu"), groups=[0] * 8)["logps"]
        (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
        found.append([logps.detach(), *(p.grad for p in scorer.network.parameters())])
    assert set(calls) == {1}
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_the_bound_on_what_is_visited_says_when_it_is_worth_it(monkeypatch):
    visible = mask([(4, (2,) * 7)])
    (tree,) = trees(visible)
    assert tree.weights == 4 * 4 + 14 * 6
    monkeypatch.setattr(branches, "WORTH", (tree.weights - 1) / 18**2)
    assert trees(visible) == ()
