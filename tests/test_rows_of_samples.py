"""Methods for rows, in runs that sample: what the rows are made of, and the loss they give, by each paper's formula."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.api import RewardSource, Score
from prefopt.plugins import Plugins, load
from prefopt.session import train
from prefopt.testing.tiny import build_tiny, tiny_config


class Letters(RewardSource):
    """A number for each reply, which hardly two replies share; of three one is far above the others."""

    name = "toy_letters"

    def score(self, groups):
        return [[Score(self._one(c.text)) for c in group.completions] for group in groups]

    def _one(self, text: str) -> float:
        return sum(ord(x) * 0.7**i for i, x in enumerate(text)) ** 8 / 1e16


@pytest.fixture
def found() -> Plugins:
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    plugins.registry.add(Letters, "test", "0")
    return plugins


class Numbers:
    """Log-probabilities of drawn replies by transformers alone, in double precision, and what methods make of them."""

    def __init__(self, policy: Path, reference: Path) -> None:
        load = AutoModelForCausalLM.from_pretrained
        self.policy, self.reference = (load(path, dtype=torch.double).eval() for path in (policy, reference))
        self.tokenizer = AutoTokenizer.from_pretrained(policy)

    def logps(self, prompt: str, reply: dict, network: torch.nn.Module | None = None) -> list[float]:
        before, ids = self.tokenizer(prompt)["input_ids"], reply["ids"]
        with torch.no_grad():
            logits = (network or self.policy)(torch.tensor([[*before, *ids]])).logits[0]
        spread = torch.log_softmax(logits, -1)
        return [spread[len(before) - 1 + t, token].item() for t, token in enumerate(ids)]

    def mean(self, reply: dict) -> float:
        return fmean(self.logps(reply["prompt"], reply))

    def odds(self, reply: dict) -> float:
        return self.mean(reply) - math.log(1 - math.exp(self.mean(reply)))

    def rho(self, reply: dict, prompt: str | None = None) -> float:
        prompt = reply["prompt"] if prompt is None else prompt
        return math.fsum(self.logps(prompt, reply)) - math.fsum(self.logps(prompt, reply, self.reference))

    def above_others(self, judged: list[dict], i: int) -> float:
        """How far the policy is from the reference on a reply to another prompt: that of the row before."""
        others = [*reversed(judged[:i]), *reversed(judged[i + 1 :])]
        own = judged[i]
        other = next(x for x in others if x["prompt"] != own["prompt"] and x["completion"] != own["completion"])
        return self.rho(other, own["prompt"])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ends(groups: list[list[dict]]) -> list[tuple[dict, dict]]:
    """The best and the worst reply of each prompt."""
    return [(max(group, key=_score), min(group, key=_score)) for group in groups]


def judged(groups: list[list[dict]]) -> list[dict]:
    """Every reply with whether it is above the mean of its prompt, the best of each prompt first."""
    means = [fmean(map(_score, group)) for group in groups]
    return [
        {**reply, "good": reply["score"] > mean}
        for group, mean in zip(groups, means, strict=True)
        for reply in sorted(group, key=_score, reverse=True)
    ]


def _score(reply: dict) -> float:
    return reply["score"]


def dpo(by: Numbers, groups: list[list[dict]]) -> float:
    return fmean(-math.log(sigmoid(0.1 * (by.rho(w) - by.rho(x)))) for w, x in ends(groups))


def ipo(by: Numbers, groups: list[list[dict]]) -> float:
    pairs = [(by.rho(w) / len(w["ids"]), by.rho(x) / len(x["ids"])) for w, x in ends(groups)]
    return fmean((w - x - 1 / (2 * 0.1)) ** 2 for w, x in pairs)


def simpo(by: Numbers, groups: list[list[dict]]) -> float:
    return fmean(-math.log(sigmoid(2 * (by.mean(w) - by.mean(x)) - 0.5)) for w, x in ends(groups))


def orpo(by: Numbers, groups: list[list[dict]]) -> float:
    imitated = [p for w, _ in ends(groups) for p in by.logps(w["prompt"], w)]
    return -fmean(imitated) + 0.1 * fmean(-math.log(sigmoid(by.odds(w) - by.odds(x))) for w, x in ends(groups))


def kto(by: Numbers, groups: list[list[dict]]) -> float:
    rows = judged(groups)
    z = max(0.0, fmean(by.above_others(rows, i) for i in range(len(rows))))
    return fmean(1 - sigmoid((1 if row["good"] else -1) * 0.1 * (by.rho(row) - z)) for row in rows)


def rrhf(by: Numbers, groups: list[list[dict]]) -> float:
    found = []
    for group in groups:
        ranked = sorted(group, key=_score, reverse=True)
        wrong = [max(0.0, by.mean(y) - by.mean(x)) for x, y in combinations(ranked, 2)]
        found.append(sum(wrong) - sum(by.logps(ranked[0]["prompt"], ranked[0])))
    return fmean(found)


def sft(by: Numbers, groups: list[list[dict]]) -> float:
    return -fmean(p for best, _ in ends(groups) for p in by.logps(best["prompt"], best))


@pytest.mark.parametrize("formula", [dpo, ipo, simpo, orpo, kto, rrhf, sft], ids=lambda f: f.__name__)
def test_a_method_for_rows_learns_from_scored_samples_by_its_formula(tiny_model, tmp_path, found, formula):
    """Pairs are the best and the worst reply, judgements those above and below the mean; the reference is another
    model."""
    build_tiny(tmp_path / "reference", seed=5)
    name = formula.__name__
    referred = found.find("algorithm", name)().needs().reference
    sections = {
        "algorithm": {"name": name},
        "reward": {"name": "toy_letters"},
        "sampler": {"name": "plain", "max_new_tokens": 6},
        "rollout": {"n": 3},
        "run": {"steps": 1},
        **({"reference": {"path": str(tmp_path / "reference")}} if referred else {}),
    }
    result = train(tiny_config(tiny_model, tmp_path / "run", sections, found), found)
    groups: dict[int, list[dict]] = {}
    for reply in pyarrow.parquet.read_table(result.folder / "rollouts.parquet").to_pylist():
        groups.setdefault(reply["row"], []).append(reply)
    assert all(len({reply["score"] for reply in group}) == 3 for group in groups.values())
    expected = formula(Numbers(tiny_model, tmp_path / "reference"), list(groups.values()))
    line = json.loads((result.folder / "metrics.jsonl").read_text())
    assert len(groups) == 8
    assert line["loss/total"] == pytest.approx(expected, rel=1e-5)
