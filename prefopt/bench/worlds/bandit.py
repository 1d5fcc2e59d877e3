"""The `bandit` world: four prompts, 85 replies to each, every reward known. Nothing is estimated: what
a policy expects, how far it is from the reference and how well any policy could do are sums over all replies.

A reply is drawn with `max_new_tokens: 3` and at temperature 1; then the sums are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat, PositiveInt

from prefopt.api import (
    Completion,
    ConfigError,
    DataSource,
    Prompt,
    Recipe,
    RewardSource,
    Rollout,
    Row,
    Score,
    Services,
    Subject,
    Task,
    World,
    lazy_import,
    show_text,
)

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy_import("numpy")

LETTERS = "abcd"
VOCABULARY = ("<end>", *LETTERS)
END = VOCABULARY.index("<end>")
LONGEST = 3
"""Tokens of a reply, the end of it counted."""


class BanditData(DataSource):
    """The prompts `a`, `b`, `c` and `d`, in turn."""

    name = "bandit"

    size: PositiveInt = 64
    """How many rows."""

    def open(self, services: Services) -> List[Row]:
        return [Prompt(prompt=LETTERS[i % len(LETTERS)], index=i) for i in range(self.size)]


class BanditReward(RewardSource):
    """The sum of two numbers for each letter of a reply: one is the prompt's for that letter, one its place's."""

    name = "bandit_gold"

    def score(self, groups: List[Rollout]) -> list[list[Score]]:
        return [[_score(show_text(group.prompt), c.text) for c in group.completions] for group in groups]


def _score(prompt: str, reply: str) -> Score:
    if prompt not in set(LETTERS) or len(reply) > LONGEST or set(reply) - set(LETTERS):
        return Score(None, f"{reply!r} is no reply to {prompt!r} in the world `bandit`")
    return Score(worth(prompt, reply))


def worth(prompt: str, reply: str) -> float:
    """The reward of a reply."""
    by_prompt, by_place = _tables()
    places = [LETTERS.index(letter) for letter in reply]
    return float(sum(by_prompt[LETTERS.index(prompt), i] + by_place[t, i] for t, i in enumerate(places)))


@cache
def _tables() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[prompt, letter] and [place, letter] -> a number, the same ones in every run."""
    rng, size = np.random.Generator(np.random.Philox(key=1)), len(LETTERS)
    return rng.normal(size=(size, size)), rng.normal(size=(LONGEST, size))


def replies() -> Iterator[Completion]:
    """Every reply a model can give: all sequences of up to three tokens that end, or are cut at the third."""
    letters = [VOCABULARY.index(letter) for letter in LETTERS]
    for length in range(LONGEST):
        yield from (_reply((*ids, END), finished=True) for ids in product(letters, repeat=length))
    yield from (_reply(ids, finished=False) for ids in product(letters, repeat=LONGEST))


def _reply(ids: tuple[int, ...], finished: bool) -> Completion:
    text = "".join(VOCABULARY[i] for i in ids if i != END)
    return Completion(text, ids=ids, finished=finished)


@dataclass(frozen=True)
class Exact:
    """Sums over all replies to one prompt, from their log-probabilities and rewards."""

    policy: List[float]
    reference: List[float]
    rewards: List[float]
    beta: float

    @property
    def mass(self) -> float:
        """The probability of all replies together: 1, or something was left out."""
        return math.fsum(map(math.exp, self.policy))

    @property
    def reward(self) -> float:
        """E[r] under the policy."""
        return math.fsum(math.exp(p) * r for p, r in zip(self.policy, self.rewards, strict=True))

    @property
    def kl(self) -> float:
        """KL(π || π_ref), in nats."""
        return math.fsum(math.exp(p) * (p - q) for p, q in zip(self.policy, self.reference, strict=True))

    @property
    def start(self) -> float:
        """E[r] under the reference, where KL is 0."""
        return math.fsum(math.exp(q) * r for q, r in zip(self.reference, self.rewards, strict=True))

    @property
    def optimum(self) -> float:
        """The largest E[r] - β KL of any policy, that of p* ~ π_ref e^(r/β): β log Σ π_ref e^(r/β)."""
        top = max(self.rewards)
        tilted = (math.exp(q + (r - top) / self.beta) for q, r in zip(self.reference, self.rewards, strict=True))
        return top + self.beta * math.log(math.fsum(tilted))


class BanditGap(Task):
    """How much of what a policy could gain of `E[r] - β KL` it has gained: 0 at the reference, 1 at the optimum. All
    numbers are exact."""

    name = "bandit_gap"

    beta: PositiveFloat = 0.5
    """β, the price of a nat of KL divergence from the reference."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        rollouts = [Rollout(prompt=prompt, completions=tuple(replies())) for prompt in LETTERS]
        found = _summed(subject, rollouts, self.beta)
        if found is None:
            return {}
        start, optimum = fmean(e.start for e in found), fmean(e.optimum for e in found)
        reward, kl = fmean(e.reward for e in found), fmean(e.kl for e in found)
        return {
            "gap_closed": (reward - self.beta * kl - start) / (optimum - start),
            "exact_reward": reward,
            "exact_kl": kl,
        }


def _summed(subject: Subject, rollouts: List[Rollout], beta: float) -> list[Exact] | None:
    """The exact sums of each prompt; None where the model has no density."""
    means, ratios = subject.mean_logps(rollouts), subject.log_ratios(rollouts)
    if means is None or ratios is None:
        return None
    found = []
    for group, mean, ratio in zip(rollouts, means, ratios, strict=True):
        policy = [(m or 0.0) * len(c.ids or ()) for m, c in zip(mean, group.completions, strict=True)]
        reference = [p - x for p, x in zip(policy, ratio, strict=True)]
        rewards = [worth(show_text(group.prompt), c.text) for c in group.completions]
        found.append(Exact(policy, reference, rewards, beta))
    if any(abs(exact.mass - 1) > 1e-3 for exact in found):
        raise ConfigError("the model is not of the world `bandit`: its replies are not all replies of that world")
    return found


class Bandit(World):
    """Four prompts, 85 replies to each, every reward known: what a method reaches is compared with what can be
    reached."""

    name = "bandit"

    def recipe(self) -> Recipe:
        config = {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
            "initializer_range": 0.1,
        }
        special = dict.fromkeys(("bos_token", "pad_token", "eos_token", "unk_token"), "<end>")
        return Recipe(config, _tokenizer(), special)


def _tokenizer() -> dict[str, Any]:
    """A token for each letter, as `tokenizer.json`. `<end>` stands before each text too: without it, attention over
    `a`, `aa` and `aaa` gives the same, and no model could follow p*."""
    first = {"SpecialToken": {"id": "<end>", "type_id": 0}}
    text = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": VOCABULARY[i], "special": True, **plain} for i in (END,)],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": text,
            "pair": [*text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<end>": {"id": "<end>", "ids": [END], "tokens": ["<end>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(VOCABULARY)}, "unk_token": "<end>"},
    }
