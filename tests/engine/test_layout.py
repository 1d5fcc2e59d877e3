"""What a forward pass sees of sequences: rows, positions, masks, and where each token's prediction stands."""

from __future__ import annotations

import torch

from prefopt.data.render import Tokens
from prefopt.engine.layout import PLAIN, Packed, Paths, tree_mask, units

SHARED = Paths("shared")
PAIR = [Tokens((5, 6, 7), (8, 1)), Tokens((5, 6, 7), (9, 10, 1))]


def test_a_pair_lies_in_one_row_behind_its_prompt():
    packed = Packed.of(PAIR, [0, 0], SHARED)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 1, 9, 10, 1]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert packed.branch.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert packed.source.tolist() == [2, 3, 2, 5, 6]
    assert packed.target.tolist() == [8, 1, 9, 10, 1]
    assert packed.last.tolist() == [4, 7]
    assert packed.unpacked(torch.tensor([1.0, 2, 3, 4, 5])).tolist() == [[1, 2, 0], [3, 4, 5]]


def test_what_completions_begin_with_is_shared_too_but_never_a_whole_one():
    same = [Tokens((5,), (6, 7, 8)), Tokens((5,), (6, 7)), Tokens((5,), (6, 7))]
    packed = Packed.of(same, [0, 0, 0], SHARED)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 7, 7]]
    assert packed.source.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert packed.last.tolist() == [3, 4, 5]


def test_a_shorter_row_is_padded_and_its_padding_seen_by_nobody():
    packed = Packed.of([*PAIR, Tokens((4,), (3, 1))], [0, 0, 1], SHARED)
    assert packed.ids[1].tolist() == [4, 3, 1, 0, 0, 0, 0, 0]
    seen = tree_mask(packed.branch, packed.positions)[1, 0]
    assert not seen[:3, 3:].any()
    assert seen.any(-1).all()


def test_a_branch_sees_the_beginning_and_itself_within_the_window():
    packed = Packed.of(PAIR, [0, 0], SHARED)
    seen = tree_mask(packed.branch, packed.positions)[0, 0]
    assert seen[6].nonzero().flatten().tolist() == [0, 1, 2, 5, 6]
    seen = tree_mask(packed.branch, packed.positions, window=3)[0, 0]
    assert seen[6].nonzero().flatten().tolist() == [2, 5, 6]
    assert seen[5].nonzero().flatten().tolist() == [1, 2, 5]


def test_sequences_without_company_need_no_mask():
    packed = Packed.of(PAIR, [0, 1], SHARED)
    assert packed.ids.shape == (2, 6)
    assert packed.branch is packed.positions is packed.attention is None
    assert Packed.of(PAIR, [0, 0], PLAIN).attention.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]


def test_a_group_shares_only_where_that_costs_less():
    short, long = Paths("shared", reach=1000.0), Paths("shared", reach=1.0)
    tokens = [Tokens(tuple(range(100)), (1,) * 50 + (i,)) for i in (2, 3)]
    other = [Tokens(tuple(range(i, 100)), (1, 2)) for i in (1, 2)]
    assert [(u.rows, u.width) for u in units(tokens, [0, 0], short)] == [(1, 152)]
    assert [(u.rows, u.width) for u in units(tokens, [0, 0], long)] == [(2, 151)]
    assert [u.rows for u in units(other, [0, 0], short)] == [2]  # nothing in common: longer rows for nothing
