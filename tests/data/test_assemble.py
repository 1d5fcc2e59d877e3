from __future__ import annotations

import pytest
from prefopt_dpo import DPO

from prefopt.api import Algorithm, Needs
from prefopt.builtin.algorithms import RewardModel, RewardModelListwise, SupervisedFineTuning
from prefopt.data.assemble import Assembler
from prefopt.data.render import Renderer, load_tokenizer
from prefopt.errors import DataError
from prefopt.rows import Comparison, Completion, Demonstration, Message, Ranking, Role


class Picky(Algorithm):
    """Refuses a row by its prompt."""

    name, eats = "picky", Comparison

    def arrange(self, rows):
        if any(row.prompt == "bad" for row in rows):
            raise DataError("a bad prompt")
        return super().arrange(rows)


def test_rows_an_algorithm_refuses_are_dropped_where_that_is_asked_for(tiny_model):
    rows = [Comparison(prompt=p, chosen=Completion("b"), rejected=Completion("c")) for p in ("a", "bad", "c")]
    reader = Renderer(load_tokenizer(str(tiny_model)))
    assembler = Assembler(rows, Picky(), reader, drop=True)
    assert len(assembler([0, 1, 2]).batch) == 4
    assert assembler.counts["rows/dropped"] == 1
    assert [reject.index for reject in assembler.unusable([0, 1, 2])] == [1]
    with pytest.raises(DataError, match="a bad prompt"):
        Assembler(rows, Picky(), reader)([0, 1, 2])


def pair(chosen: str, rejected: str, **numbers) -> Comparison:
    return Comparison(prompt="p:", chosen=Completion(chosen), rejected=Completion(rejected), **numbers)


ROWS = [pair("a", "bb", preference=0.9), pair("c", "d", preference=0.5), pair("e", "f"), pair("g" * 60, "h")]


def assembler(tiny_model, algorithm, rows=ROWS, **options) -> Assembler:
    return Assembler(rows, algorithm, Renderer(load_tokenizer(str(tiny_model)), **options))


def test_rows_become_sequences_with_roles_groups_and_columns(tiny_model):
    built = assembler(tiny_model, RewardModel())([2, 0])
    assert built.batch.role.tolist() == [Role.CHOSEN, Role.REJECTED] * 2
    assert built.batch.group.tolist() == [0, 0, 1, 1]
    assert built.batch.preference.tolist() == pytest.approx([1, 1, 0.9, 0.9])
    assert [len(t.completion) for t in built.tokens] == [2, 2, 2, 3]


def test_a_tie_is_dropped_and_counted_unless_the_algorithm_asks_for_preferences(tiny_model):
    dpo, reward = (assembler(tiny_model, algorithm) for algorithm in (DPO(), RewardModel()))
    assert len(dpo([0, 1]).batch) == 2
    assert dpo.counts["rows/ties"] == 1
    assert len(reward([0, 1]).batch) == 4


def test_a_step_left_without_rows_is_none(tiny_model):
    assert assembler(tiny_model, DPO())([1]) is None
    assert assembler(tiny_model, DPO(), max_length=20, overflow="drop")([3]) is None


def test_any_row_feeds_any_algorithm_it_can_become(tiny_model):
    ranking = Ranking(prompt="p:", completions=(Completion("a"), Completion("b"), Completion("c")), ranks=(0, 1, 2))
    sizes = {SupervisedFineTuning(): 1, DPO(): 6, RewardModelListwise(): 3}
    for algorithm, size in sizes.items():
        assert len(assembler(tiny_model, algorithm, [ranking])([0]).batch) == size


def test_checking_names_every_unusable_row_and_counts_nothing(tiny_model):
    made = assembler(tiny_model, DPO(), [*ROWS, pair("x" * 70, "y")], max_length=40)
    with pytest.raises(DataError) as caught:
        made.check(range(5))
    assert [p.where.partition(",")[0] for p in caught.value.problems] == ["row 3", "row 4"]
    assert not made.counts


class Margins(DPO):
    name = "margins"

    def needs(self) -> Needs:
        return Needs(rows={"margin"}, during={"logps"})


def test_an_absent_number_is_an_error_and_not_zero(tiny_model):
    with pytest.raises(DataError, match="needs `margin`, but the row has preference"):
        assembler(tiny_model, Margins())([0])


def test_rows_that_cannot_be_used_are_dropped_and_counted_where_that_is_allowed(tiny_model):
    rows = [*ROWS, pair("i", "i")]
    strict, lenient = (
        Assembler(rows, Margins(), Renderer(load_tokenizer(str(tiny_model))), drop=drop) for drop in (False, True)
    )
    with pytest.raises(DataError):
        strict([0, 4])
    assert lenient([0, 4]) is None
    assert lenient.counts["rows/dropped"] == 2
    found = lenient.unusable(range(5))
    assert [reject.index for reject in found] == [0, 2, 3, 4]  # row 1 is a tie
    assert lenient.counts["rows/dropped"] == 2  # looking changes no count


def test_several_trained_spans_reach_the_batch(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    )
    talk = tuple(Message(role, text) for role, text in (("user", "ab"), ("assistant", "cd"), ("user", "ef")))
    row = Demonstration(prompt=talk, completion=Completion("g"))
    made = Assembler([row], SupervisedFineTuning(), Renderer(tokenizer, train_on="all"))([0])
    assert tokenizer.decode(made.tokens[0].completion) == "cd<end>efg<end>"
    assert made.batch.mask.tolist() == [[True] * 3 + [False] * 2 + [True] * 2]
    assert made.batch.counts["tokens"] == 5
