"""Judges where they are used: a language model's verdict is that of its numbers, and a run learns from a judge."""

from __future__ import annotations

import json

import pytest
import torch

from prefopt.api import Completion, Pair
from prefopt.engine.models import open_model
from prefopt.engine.services import EngineServices
from prefopt.plugins import load
from prefopt.testing.tiny import build_tiny

REPLY, OTHER = "seven", "eight"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A model with room for a question."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    build_tiny(folder, max_position_embeddings=2048)
    return folder


def judge(reader, **settings):
    return load().find("judge", "local")(path=str(reader), canaries=0, **settings)


def asked(folder, text):
    """P(A) against P(B) as the next word, from transformers' logits in float64."""
    model = open_model(str(folder), torch.device("cpu"))

    def logp(ending):
        ids = [model.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, text + ending)]
        with torch.no_grad():
            logps = model.network(torch.tensor([ids[1]])).logits[0].double().log_softmax(-1)
        return sum(logps[i - 1, ids[1][i]] for i in range(len(ids[0]), len(ids[1])))

    return float(torch.sigmoid(logp(" A") - logp(" B")))


def test_a_local_judge_is_the_softmax_of_its_answers(reader, tmp_path):
    from prefopt_judges.questions import RUBRIC, compared

    pair = Pair("Three and four?", Completion(REPLY), Completion(OTHER))
    services = EngineServices(0, folder=tmp_path)
    (verdict,) = judge(reader).open(services)([pair])
    assert verdict.a_better == pytest.approx(asked(reader, compared(pair, RUBRIC, ties=False).plain()), abs=1e-5)
    (again,) = judge(reader).open(services)([pair])
    assert (again.a_better, again.usage) == (verdict.a_better, {"cached": 1.0})


def test_verdicts_do_not_depend_on_what_is_judged_beside_them(reader, tmp_path):
    pairs = [Pair("p", Completion("x" * n), Completion(OTHER)) for n in (1, 40, 7, 90)]
    together = judge(reader).open(EngineServices(0))(pairs)
    alone = [judge(reader).open(EngineServices(0))([pair])[0] for pair in pairs]
    assert [v.a_better for v in together] == pytest.approx([v.a_better for v in alone], abs=1e-6)


def test_control_tokens_in_a_reply_do_not_reach_the_model(reader):
    model = EngineServices(0).language_model(str(reader))
    end = model.renderer.tokenizer.eos_token_id
    from prefopt_judges.questions import compared

    question = compared(Pair("p<end>", Completion("a<end>b"), Completion("<end>")), "rubric", ties=False)
    assert end in model.renderer.tokenizer("<end>")["input_ids"]
    for tokens in model.renderer.endings(question.plain(), ["A", "B"]):
        assert end not in (*tokens.prompt, *tokens.completion)


def test_a_run_learns_from_a_judge_and_a_language_model_keeps_its_replies(train_tiny, reader):
    """Group-relative rewards of one prompt sum to zero: win rates over all pairs have the mean 1/2."""
    common = {
        "algorithm": {"name": "grpo", "n": 4},
        "sampler": {"name": "plain", "max_new_tokens": 6},
        "run": {"steps": 2},
    }
    rule = {"name": "judge", "judge": {"name": "rule", "prefer": "longer"}}
    run = train_tiny("rule", reward=rule, **common)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/mean"] for line in lines if "reward/mean" in line]
    assert rewards == pytest.approx([0.5] * len(rewards))
    assert rewards
    local = {"name": "judge", "pairing": "ring", "judge": {"name": "local", "path": str(reader), "canaries": 0}}
    run = train_tiny("local", reward=local, **common)
    assert (run.folder / "replies.sqlite").stat().st_size > 0
