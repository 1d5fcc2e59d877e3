"""Meaning and gold of the `replies` world, sentence by sentence."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from prefopt.bench.worlds.replies.gold import PARTS, Gold, value_parts
from prefopt.bench.worlds.replies.language import (
    ANSWERS,
    MANNERS,
    QUESTIONS,
    REFUSALS,
    Act,
    Kind,
    Request,
    read_reply,
    read_request,
    sentences,
)
from prefopt.bench.worlds.replies.world import Replies, RepliesData, vocabulary
from prefopt.bench.worlds.replies.writers import Habits, write_reply, write_request
from prefopt.engine.models import recipe_tokenizer
from prefopt.engine.services import EngineServices
from prefopt.rows import Comparison, Completion, Ranking, Rollout

REFUND = Request("refund", "1130", upset=False)
UPSET = Request("refund", "1130", upset=True)
GOOD = " Hello! We have refunded order 1130. Have a nice day!"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_every_sentence_means_what_it_was_written_for():
    for table, kind in ((ANSWERS, Kind.ANSWER), (REFUSALS, Kind.REFUSE)):
        for topic, texts in table.items():
            for text in texts:
                assert read_reply(" " + text.format(order="1009", day="Monday")) == (Act(kind, topic, "1009"),)
    for kind, texts in MANNERS.items():
        for text in texts:
            assert read_reply(text.format(order="1009"))[0].kind == kind


def test_no_sentence_has_two_meanings():
    replies = [*chain(*ANSWERS.values()), *chain(*REFUSALS.values()), *chain(*MANNERS.values())]
    assert len(set(replies)) == len(replies)
    assert all(topic in ANSWERS and topic in REFUSALS for topic in QUESTIONS)


def test_what_is_outside_the_language_is_noise():
    acts = read_reply(" Hello! We have order refunded 1130. Have a nice")
    assert [act.kind for act in acts] == [Kind.GREET, Kind.NOISE, Kind.NOISE]
    with pytest.raises(ValueError, match="no question"):
        read_request("Customer: Hello.\nShop:")


def test_writers_write_what_readers_read(rng):
    for _ in range(300):
        prompt = write_request(rng)
        request = read_request(prompt)
        assert request.order in prompt
        assert Kind.NOISE not in {act.kind for act in read_reply(write_reply(request, rng))}


@pytest.mark.parametrize(
    ("request_", "reply", "expected"),
    [
        (REFUND, GOOD, (1, 1, 1, 1)),
        (REFUND, " We have refunded order 1130.", (1, 1, 0, 1)),
        (REFUND, " Hello! We have not refunded order 1130. Have a nice day!", (0, 1, 1, 2 / 3)),
        (REFUND, " Hello! We have refunded order 1251. Have a nice day!", (1, 0, 1, 1)),
        (REFUND, " Order 1130 is cancelled.", (0, 1, 0, 0)),
        (REFUND, " We have refunded order 1130. We have not refunded order 1130.", (0, 1, 0, 1 / 2)),
        (REFUND, GOOD + " Quality is our promise.", (1, 1, 1, 3 / 4)),
        (REFUND, GOOD + " You are absolutely right!", (1, 1, 1, 3 / 4)),
        (REFUND, GOOD + " Read the terms next time.", (1, 1, 0, 3 / 4)),
        (UPSET, GOOD, (1, 1, 0.5, 1)),
        (UPSET, " We are sorry for the trouble." + GOOD, (1, 1, 1, 1)),
        (REFUND, " We are sorry for the trouble." + GOOD, (1, 1, 1, 3 / 4)),
        (REFUND, "", (0, 0, 0, 0)),
        (REFUND, " refunded order 1130 Hello nice day", (0, 1, 0, 0)),
    ],
)
def test_gold_reads_meaning_and_not_words(request_, reply, expected):
    assert tuple(value_parts(request_, reply).values()) == pytest.approx(expected)


def test_gold_is_the_sum_of_four_parts_and_says_when_it_cannot_score():
    prompt = "Customer: I want my money back for order 1130.\nShop:"
    (scores,) = Gold().score([Rollout(prompt=prompt, completions=(Completion(GOOD), Completion("")))])
    assert [s.value for s in scores] == [4.0, 0.0]
    assert tuple(scores[0].parts) == PARTS
    ((missing,),) = Gold().score([Rollout(prompt="What is this?", completions=(Completion(GOOD),))])
    assert missing.value is None
    assert "no question of the replies world" in missing.reason


def test_a_perfect_assistant_reaches_the_maximum(rng):
    habits = Habits(1, 1, 0, 1, 0, 0, 1, 0, 0, 1, fillers=0)
    requests = [read_request(write_request(rng)) for _ in range(50)]
    assert all(sum(value_parts(r, write_reply(r, rng, habits)).values()) == 4 for r in requests)


def test_text_survives_the_tokenizer(rng):
    tokenizer = recipe_tokenizer(Replies().recipe())
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == len(vocabulary()) + 3
    for _ in range(100):
        prompt = write_request(rng)
        text = prompt + write_reply(read_request(prompt), rng)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert all(" " + s.split()[0] in tokenizer.get_vocab() for s in sentences() if s.split()[0].isalpha())


def rows(seed: int = 0, **settings):
    return RepliesData(**settings).open(EngineServices(seed))


def test_a_seed_redraws_the_data_and_splits_share_no_message():
    train, again, other = (rows(s, format="prompts", size=200) for s in (0, 0, 1))
    assert train == again != other
    held_out = rows(0, format="prompts", size=200, split="held_out")
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert len(RepliesData(format="prompts").peek(EngineServices(0))) == 20


@pytest.mark.parametrize("format_", ["demonstrations", "comparisons", "rankings", "judgements", "prompts"])
def test_every_format_gives_rows_of_its_kind(format_):
    made = rows(format=format_, size=5)
    assert [r.index for r in made] == [0, 1, 2, 3, 4]
    assert {type(r).kind for r in made} == {format_.removesuffix("s")}


def test_comparisons_are_upright_and_votes_add_up():
    for row in rows(format="comparisons", size=100, voters=5, annotators={"tie_width": 0.5}):
        assert isinstance(row, Comparison)
        assert sum(row.votes) == 5
        assert row.preference == pytest.approx((row.votes[0] + row.votes[2] / 2) / 5)
        assert row.preference >= 0.5


def test_rankings_follow_their_votes():
    for row in rows(format="rankings", size=20, voters=3, completions=5):
        assert isinstance(row, Ranking)
        assert len(row.completions) == 5
        assert all(sorted(vote) == [0, 1, 2, 3, 4] for vote in row.votes)
        totals = [sum(vote[i] for vote in row.votes) for i in range(5)]
        for i in range(5):
            assert all((totals[i] < totals[j]) == (row.ranks[i] < row.ranks[j]) for j in range(5))
