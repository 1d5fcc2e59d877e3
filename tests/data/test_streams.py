from __future__ import annotations

import pytest

from prefopt.data.streams import Order, derive, generator, split


def test_a_key_depends_on_every_name_and_its_type():
    keys = {derive(0, "a"), derive(0, "b"), derive(1, "a"), derive("0", "a"), derive(0, "a", 0), derive("0a")}
    assert len(keys) == 6
    assert all(0 <= key < 2**63 for key in keys)


def test_keys_are_the_same_on_every_machine():
    """Recorded once: results of old seeds must stay reproducible."""
    assert derive(0, "order", 1) == 3583953554662909129
    assert generator(7, "x").integers(1000, size=3).tolist() == [88, 802, 914]


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order():
    order = Order(range(10), batch_size=4, seed=3)
    assert order.steps_per_epoch == 3
    first, second = ([order.step(s) for s in range(e * 3, e * 3 + 3)] for e in (0, 1))
    assert [len(step) for step in first] == [4, 4, 2]
    for epoch in (first, second):
        assert sorted(i for step in epoch for i in step) == list(range(10))
    assert first != second


def test_a_step_is_a_pure_function_of_its_number():
    assert Order(range(10), 4, 3).step(7) == Order(range(10), 4, 3).step(7)
    assert Order(range(10), 4, 3).step(7) != Order(range(10), 4, 4).step(7)


@pytest.mark.parametrize("held_out", [1, 3])
def test_a_split_is_whole_disjoint_and_depends_on_the_seed(held_out):
    train, kept = split(12, held_out, seed=0)
    assert sorted(train + kept) == list(range(12))
    assert len(kept) == held_out
    assert split(12, held_out, seed=0) == (train, kept)
    assert any(split(12, held_out, seed=s)[1] != kept for s in range(1, 5))
