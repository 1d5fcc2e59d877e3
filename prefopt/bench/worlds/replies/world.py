"""The `replies` world as components: its data, its base model, and their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Sequence as List
from hashlib import sha256
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt

from prefopt.api import (
    Comparison,
    Completion,
    DataSource,
    Demonstration,
    Judgement,
    Prompt,
    Ranking,
    Recipe,
    Row,
    Services,
    World,
)
from prefopt.bench.worlds.replies.annotators import Annotators, Pool
from prefopt.bench.worlds.replies.language import DAYS, ORDERS, PROMPT, Request, read_request, sentences
from prefopt.bench.worlds.replies.writers import write_reply, write_request

if TYPE_CHECKING:
    import numpy as np

Format = Literal["demonstrations", "comparisons", "rankings", "judgements", "prompts"]
PEEK = 20


class RepliesData(DataSource):
    """Messages of customers with replies of shop assistants, demonstrated, compared, ranked or judged by annotators."""

    name = "replies"

    format: Format = "demonstrations"
    """What the rows are."""
    size: PositiveInt = 2000
    """How many."""
    split: Literal["train", "held_out"] = "train"
    """No message is in both."""
    completions: int = Field(4, ge=2)
    """Replies in a ranking."""
    voters: PositiveInt = 1
    """People who see each comparison or ranking."""
    annotators: Annotators = Annotators()
    """Who they are."""

    def open(self, services: Services) -> List[Row]:
        return list(islice(self._rows(services), self.size))

    def peek(self, services: Services) -> List[Row]:
        return list(islice(self._rows(services), PEEK))

    def _rows(self, services: Services) -> Iterator[Row]:
        rng = services.rng("replies", self.format, self.split)
        pool = self.annotators.pool(services.rng("replies annotators"))
        write = {
            "demonstrations": self._demonstration,
            "comparisons": self._comparison,
            "rankings": self._ranking,
            "judgements": self._judgement,
            "prompts": self._prompt,
        }[self.format]
        for index, prompt in enumerate(_messages(rng, self.split)):
            yield write({"prompt": prompt, "index": index}, read_request(prompt), pool, rng)

    def _prompt(self, shared: dict[str, Any], request: Request, pool: Pool, rng: np.random.Generator) -> Row:
        return Prompt(**shared)

    def _demonstration(self, shared: dict[str, Any], request: Request, pool: Pool, rng: np.random.Generator) -> Row:
        return Demonstration(**shared, completion=Completion(write_reply(request, rng)))

    def _comparison(self, shared: dict[str, Any], request: Request, pool: Pool, rng: np.random.Generator) -> Row:
        a, b = _different_replies(request, 2, rng)
        votes = [pool.vote(shared["prompt"], a, b, person, rng) for person in self._people(rng)]
        sides = [[s for s in votes if s > 0], [s for s in votes if s < 0], [s for s in votes if s == 0]]
        counts = (len(sides[0]), len(sides[1]), len(sides[2]))
        share = (counts[0] + counts[2] / 2) / len(votes)
        margin = None if share == 0.5 else fmean(sides[0] if share > 0.5 else sides[1])  # as the majority sees it
        told = {**shared, "chosen": Completion(a), "rejected": Completion(b)}
        return Comparison(**told, preference=share, margin=margin, votes=counts).upright()

    def _ranking(self, shared: dict[str, Any], request: Request, pool: Pool, rng: np.random.Generator) -> Row:
        replies = _different_replies(request, self.completions, rng)
        votes = tuple(pool.rank(shared["prompt"], replies, person, rng) for person in self._people(rng))
        means = [sum(places) for places in zip(*votes, strict=True)]
        order = sorted(set(means))
        ranks = tuple(order.index(mean) for mean in means)
        return Ranking(**shared, completions=tuple(map(Completion, replies)), ranks=ranks, votes=votes)

    def _judgement(self, shared: dict[str, Any], request: Request, pool: Pool, rng: np.random.Generator) -> Row:
        """A reply is called desirable when a person prefers it to another assistant's reply."""
        a, b = _different_replies(request, 2, rng)
        liked = pool.vote(shared["prompt"], a, b, self._people(rng)[0], rng) > 0
        return Judgement(**shared, completion=Completion(a), desirable=liked)

    def _people(self, rng: np.random.Generator) -> list[int]:
        people = self.annotators.people
        return [int(i) for i in rng.choice(people, self.voters, replace=self.voters > people)]


def _messages(rng: np.random.Generator, split: str) -> Iterator[str]:
    """Customers' messages without end; a message belongs to one split, by its hash."""
    while True:
        prompt = write_request(rng)
        if (sha256(prompt.encode()).digest()[0] < 26) == (split == "held_out"):
            yield prompt


def _different_replies(request: Request, n: int, rng: np.random.Generator) -> list[str]:
    replies: dict[str, None] = {}
    while len(replies) < n:
        replies[write_reply(request, rng)] = None
    return list(replies)


class Replies(World):
    """Customers write about their orders, a shop replies: readable, learnable in seconds, with a known gold reward."""

    name = "replies"

    def recipe(self) -> Recipe:
        config = {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,  # so that a head can carry a whole order number
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
        }
        return Recipe(config, _tokenizer(), {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"})


WORD = re.compile(r" ?[A-Za-z']+| ?\d+|\s|[^\sA-Za-z\d']")


def vocabulary() -> list[str]:
    """Every word of the world, with the space before it, in a fixed order."""
    texts = [*sentences(), PROMPT.format(message=""), *DAYS, *ORDERS]
    plain = (re.sub(r"\{\w+\}", "", text) for text in texts)
    words = {word for text in plain for word in WORD.findall(text)}
    spaced = {" " + word for word in words if word[0].isalnum()}
    return sorted(words | spaced)


def _tokenizer() -> dict[str, Any]:
    """A word tokenizer as `tokenizer.json`: one token a word or mark, spaces kept, so that text survives a round
    trip."""
    special = ["<pad>", "<end>", "<unk>"]
    added = [
        {"id": i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(special)
    ]
    split = {"type": "Split", "pattern": {"Regex": WORD.pattern}, "behavior": "Isolated", "invert": False}
    ids = {token: i for i, token in enumerate([*special, *vocabulary()])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"},
    }
