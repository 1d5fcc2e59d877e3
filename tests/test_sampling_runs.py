"""Runs that sample while they train: what is drawn, scored, kept, written, and done again after a resume."""

from __future__ import annotations

import json
import math
import re
import string
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import ClassVar

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.api import Completion, Draw, Loss, Needs, RewardSource, Role, RolloutAlgorithm, Score
from prefopt.builtin.continuous import Continuous
from prefopt.builtin.samplers import Plain
from prefopt.errors import ConfigError, ServiceError
from prefopt.plugins import Plugins, load
from prefopt.session import Result, Session, train
from prefopt.testing.tiny import build_tiny, tiny_config


class Reinforce(RolloutAlgorithm):
    """The policy gradient with the group's mean as baseline."""

    name = "toy_reinforce"
    n: int = 4
    reference: bool = False
    seen: ClassVar[list] = []
    kept: ClassVar[list] = []

    def needs(self):
        before = {"reference_logps"} if self.reference else set()
        before |= set() if self.on_policy else {"old_logps"}
        return Needs(draws=(Draw(self.n),), rows={"score"}, before=before, during={"logps"})

    def prepare(self, batch, ctx):
        grouped = batch.by_group(batch.score)
        mean = grouped.mean(1)[torch.unique(batch.group, return_inverse=True)[1]]
        return batch.with_columns(advantages=batch.score - mean)

    def loss(self, batch, policy):
        old = policy.logps.detach() if self.on_policy else batch.old_logps
        ratio = torch.exp(policy.logps - old) * batch.mask
        self.seen.append((ratio.detach() - 1)[batch.mask].abs().max().item())
        loss = -batch.mean(batch.advantages * batch.mean_tokens(ratio), "sequences")
        return Loss(loss, {"advantage/size": batch.mean(batch.advantages.abs(), "sequences")})

    def idle(self, batch):
        return batch.advantages == 0


class Picky(Reinforce):
    """Keeps the groups that `kept` says."""

    name = "toy_picky"

    def keep(self, group):
        self.kept.append(group.index)
        return len(self.kept) > 3


class Choosy(Reinforce):
    """Says of each update what `verdicts` says."""

    name = "toy_choosy"
    verdicts: ClassVar[list[str]] = []

    def accept(self, metrics):
        return self.verdicts.pop(0)


class Greedy(Reinforce):
    """Its baseline is the score of a greedy reply; a reference reply is drawn too."""

    name = "toy_greedy"

    def needs(self):
        return Needs(
            draws=(Draw(2), Draw(1, greedy=True, role=Role.OPPONENT), Draw(1, source="reference", role=Role.OPPONENT)),
            rows={"score"},
        )

    def arrange(self, rows):
        self.kept.extend(rows)
        found = super().arrange(rows)
        return [s for s in found if s.role == Role.SAMPLE]


class Measured(Reinforce):
    """Measures how far the policy has moved, and asks what its samples were as likely as."""

    name = "toy_measured"
    opponent: bool = False

    def needs(self):
        draws = (Draw(self.n), Draw(1, source="reference", role=Role.OPPONENT)) if self.opponent else (Draw(self.n),)
        return Needs(draws=draws, rows={"score"}, before={"old_logps", "sampled_logps"}, during={"logps"})

    def prepare(self, batch, ctx):
        self.kept.append((batch.old_logps, batch.sampled_logps))
        return super().prepare(batch, ctx)


class Edited(Measured):
    """Says the last token of a sample twice."""

    name = "toy_edited"

    def arrange(self, rows):
        return [
            replace(s, completion=replace(s.completion, ids=(*s.completion.ids, s.completion.ids[-1])))
            for s in super().arrange(rows)
        ]


class Digits(RewardSource):
    """The share of the letter `1`; rows in `broken` cannot be scored, and every call is counted."""

    name = "toy_digits"
    broken: tuple[int, ...] = ()
    nan: bool = False
    calls: ClassVar[list] = []

    def score(self, groups):
        self.calls.append(len(groups))
        return [[self._one(group.index, k, c) for k, c in enumerate(group.completions)] for group in groups]

    def _one(self, row: int, k: int, completion: Completion) -> Score:
        if row in self.broken and k == 1:
            return Score(math.nan) if self.nan else Score(None, "the scale is broken")
        share = completion.text.count("1") / max(len(completion.text), 1)
        return Score(share, parts={"ones": share})


@pytest.fixture
def found() -> Plugins:
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    for component in (Reinforce, Picky, Choosy, Greedy, Measured, Edited, Digits, Held, Stranger):
        plugins.registry.add(component, "test", "0")
    for log in (Reinforce.seen, Reinforce.kept, Digits.calls, Held.seen):
        log.clear()
    return plugins


class Held(Plain):
    """Says when it may draw, and where it may keep things."""

    name = "toy_held"
    seen: ClassVar[list] = []

    @contextmanager
    def running(self, services):
        self.seen.append(services.kept("held"))
        try:
            yield self
        finally:
            self.seen.append("over")

    def open(self, model, other=None, mix=0.0):
        self.seen.append("open")
        return super().open(model, other, mix)


class Stranger(Plain):
    """As if another program had drawn."""

    name = "toy_stranger"
    tells_own_logps = False


class Met:
    """A reward and samplers that wait for each other: neither comes to an end before the other is at work."""

    scoring, drawn = threading.Event(), threading.Event()

    class Reward(Digits):
        name = "toy_met"

        def score(self, groups):
            Met.scoring.set()
            assert Met.drawn.wait(60), "nothing is drawn while this is scored"
            return super().score(groups)

    class Drawing:
        def open(self, model, other=None, mix=0.0):
            drawer = super().open(model, other, mix)

            def drawn(requests):
                for i, found in enumerate(drawer(requests)):
                    if i == len(requests) - 1:
                        assert Met.scoring.wait(60), "nothing is scored while this is drawn"
                        Met.drawn.set()
                    yield found

            return drawn

    class DrawingPlain(Drawing, Plain):
        name = "toy_met_plain"

    class DrawingContinuous(Drawing, Continuous):
        name = "toy_met_continuous"

    class Backwards(Plain):
        def open(self, model, other=None, mix=0.0):
            drawer = super().open(model, other, mix)
            return lambda requests: reversed(list(drawer(requests)))

    class DrawingBackwards(Drawing, Backwards):
        """The first row's replies come last."""

        name = "toy_met_backwards"


SECTIONS = {
    "algorithm": {"name": "toy_reinforce"},
    "reward": {"name": "toy_digits"},
    "sampler": {"name": "plain", "max_new_tokens": 6},
    "optim": {"lr": 2e-2, "batch_size": 8, "schedule": "constant", "warmup": 0.0},
    "run": {"steps": 4},
}
LETTERS = list(string.ascii_letters)
"""Half of all tokens: replies that end there differ in length."""
SLOTS = {"name": "continuous", "slots": 5, "stop": LETTERS}
"""Longer prompts first, and a slot goes to the next reply when one ends: they come in another order than their rows."""


def run(model: Path, folder: Path, found: Plugins, resume: bool = False, **sections) -> Result:
    return train(tiny_config(model, folder, {**SECTIONS, **sections}, found), found, resume=resume)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_reward_rises_and_everything_drawn_is_kept_as_a_table(tiny_model, tmp_path, found):
    result = run(tiny_model, tmp_path / "run", found, run={"steps": 12}, eval={"every": 6, "samples": 4, "rows": 4})
    lines = metrics(result.folder)
    rewards = [m["reward/mean"] for m in lines if "reward/mean" in m]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert all(m["reward/ones"] == m["reward/mean"] for m in lines if "reward/ones" in m)
    assert max(m["sampler/gap"] for m in lines if "sampler/gap" in m) < 1e-5
    assert {"eval/reward/mean", "eval/kl/sequence"} <= lines[-1].keys()
    table = pyarrow.parquet.read_table(result.folder / "rollouts.parquet").to_pylist()
    assert len(table) == 4 * 23 * 4  # epochs, rows that are not held out, replies
    assert table[0].keys() == {
        "step", "row", "prompt", "completion", "role", "source", "score", "finished", "ids", "logps",
        "used", "reason",
    }  # fmt: skip
    assert result.budget["sampled"] == sum(len(row["ids"]) for row in table)
    first = [row["score"] for row in table if row["step"] == 0]
    assert sum(first) / len(first) == pytest.approx(rewards[0])
    assert not (result.folder / "journal").exists()


def surprises(model, prompt: list[int], ids: list[int]) -> list[float]:
    """The negative log-probability of each token of one reply, read alone."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return [-row[i].item() for row, i in zip(logits.log_softmax(-1), ids, strict=True)]


def test_perplexity_under_the_base_is_that_of_every_token_drawn(tiny_model, tmp_path, found):
    """Against another model than the policy, row by row in float64; replies differ in length."""
    build_tiny(tmp_path / "base", seed=1)
    sections = {"algorithm": {"name": "toy_reinforce", "reference": True}, "run": {"steps": 2}}
    sections |= {"reference": {"path": str(tmp_path / "base")}}
    sections |= {"sampler": {"name": "continuous", "max_new_tokens": 6, "stop": LETTERS}}
    result = run(tiny_model, tmp_path / "run", found, **sections)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    table = pyarrow.parquet.read_table(result.folder / "rollouts.parquet").to_pylist()
    assert len({len(row["ids"]) for row in table}) > 3
    for step, line in enumerate(metrics(result.folder)):
        drawn = [(tokenizer(row["prompt"])["input_ids"], row["ids"]) for row in table if row["step"] == step]
        mean = fmean(nll for prompt, ids in drawn for nll in surprises(base, prompt, ids))
        assert line["completion/base_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_perplexity_under_the_base_is_not_told_at_another_temperature(tiny_model, tmp_path, found):
    sections = {"algorithm": {"name": "toy_reinforce", "reference": True}, "run": {"steps": 1}}
    sections |= {"sampler": {"name": "plain", "max_new_tokens": 6, "temperature": 0.5}}
    (line,) = metrics(run(tiny_model, tmp_path / "run", found, **sections).folder)
    assert "reward/mean" in line
    assert "completion/base_perplexity" not in line


def standardised(values: list[float]) -> list[float]:
    return [(x - fmean(values)) / (stdev(values) + 1e-4) for x in values]


def test_several_rewards_are_summed_before_a_method_standardises_them(tiny_model, tmp_path, found, monkeypatch):
    """GRPO's advantages are those of the sums, not the sum of the advantages of the parts."""
    method, seen = found.find("algorithm", "grpo"), []
    prepare = method.prepare
    monkeypatch.setattr(method, "prepare", lambda *given: seen.append(prepare(*given)) or seen[-1])
    parts = [{"source": {"name": "toy_digits"}, "weight": 10.0}]
    parts += [{"source": {"name": "repetition", "n": 1, "unit": "characters"}}]
    sections = {"algorithm": {"name": "grpo", "n": 4}, "reward": {"name": "weighted", "parts": parts}}
    result = run(tiny_model, tmp_path / "run", found, run={"steps": 1}, **sections)
    table = pyarrow.parquet.read_table(result.folder / "rollouts.parquet").to_pylist()
    texts = [[row["completion"] for row in table[i : i + 4]] for i in range(0, len(table), 4)]
    ones = [[10 * text.count("1") / max(len(text), 1) for text in group] for group in texts]
    again = [[len(set(text)) / max(len(text), 1) - bool(text) for text in group] for group in texts]
    sums = [[x + y for x, y in zip(*both, strict=True)] for both in zip(ones, again, strict=True)]
    expected = [x for group in sums for x in standardised(group)]
    assert seen[0].advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
    apart = [x + y for both in zip(ones, again, strict=True) for x, y in zip(*map(standardised, both), strict=True)]
    assert max(abs(x - y) for x, y in zip(expected, apart, strict=True)) > 0.5


def test_samples_used_once_are_as_likely_as_the_sampler_says(tiny_model, tmp_path, found):
    """No pass of the policy tells it again: the numbers are those of the pass up to rounding."""
    told = run(tiny_model, tmp_path / "told", found, algorithm={"name": "toy_measured"}, run={"steps": 1})
    asked = {"lr": 2e-2, "batch_size": 8, "schedule": "constant", "warmup": 0.0, "forward": "plain"}
    plain = run(
        tiny_model, tmp_path / "plain", found, algorithm={"name": "toy_measured"}, run={"steps": 1}, optim=asked
    )
    (old, sampled), (scored, same) = Reinforce.kept
    assert torch.equal(sampled, same)
    assert torch.equal(old, sampled)
    assert not torch.equal(scored, sampled)
    torch.testing.assert_close(scored, old, atol=1e-5, rtol=0)
    forward = [result.budget["forward"] for result in (told, plain)]
    assert forward[0] == 0 < forward[1]


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": {"name": "toy_measured", "minibatches": 2}},
        {"algorithm": {"name": "toy_measured", "opponent": True}, "reference": {"mode": "resident"}},
        {"algorithm": {"name": "toy_edited"}},
        {"optim": {"batch_size": 8, "precision": "bfloat16"}},
        {"sampler": {"name": "toy_stranger", "max_new_tokens": 6}},
    ],
    ids=[
        "several updates",
        "samples of another model",
        "samples that were edited",
        "bfloat16",
        "another program's samples",
    ],
)
def test_where_the_sampler_cannot_know_a_pass_of_the_policy_tells(tiny_model, tmp_path, found, change):
    sections = {"algorithm": {"name": "toy_measured"}, "run": {"steps": 1}, **change}
    result = run(tiny_model, tmp_path / "run", found, **sections)
    assert result.budget["forward"] > 0
    old, sampled = Reinforce.kept[0]
    assert not torch.equal(old, sampled)


def test_the_first_minibatch_has_ratio_one_and_later_ones_do_not(tiny_model, tmp_path, found):
    algorithm = {"name": "toy_reinforce", "inner_epochs": 2, "minibatches": 2}
    result = run(tiny_model, tmp_path / "run", found, algorithm=algorithm, run={"steps": 1})
    assert json.loads((result.folder / "result.json").read_text())["updates"] == 4
    assert Reinforce.seen[0] < 1e-6
    assert min(Reinforce.seen[-2:]) > 1e-4


def test_a_stop_leaves_out_what_is_left_of_its_step_and_nothing_of_the_next(tiny_model, tmp_path, found):
    """The same bytes as if everything that is left out had been computed and skipped."""
    algorithm = {"name": "toy_choosy", "inner_epochs": 2, "minibatches": 2}
    second, last = ["step", "skip", "step", "step"], ["step"] * 4
    verdicts = {
        "stop": ["step", "stop", *second, "stop", *last],
        "skip": ["step", *["skip"] * 3, *second, *["skip"] * 4, *last],
    }
    facts, rates, models = {}, {}, set()
    for name, said in verdicts.items():
        Choosy.verdicts[:] = said
        folder = run(tiny_model, tmp_path / name, found, algorithm=algorithm).folder
        assert Choosy.verdicts == []
        facts[name] = json.loads((folder / "result.json").read_text())
        rates[name] = [line["lr"] / 2e-2 for line in metrics(folder)]
        models.add((folder / "model/model.safetensors").read_bytes())
    assert len(models) == 1
    assert [(f["steps"], f["updates"], f["skipped"]) for f in facts.values()] == [(4, 8, 3), (4, 8, 8)]
    assert rates["stop"] == pytest.approx([1 / 2, 3 / 4, 0, 1])
    assert rates["skip"] == pytest.approx([1 / 4, 3 / 4, 0, 1])
    backward = [f["budget"]["backward"] for f in facts.values()]
    assert len(Reinforce.seen) == 11 + 16
    assert backward[0] < backward[1]


def test_a_limit_of_divergence_ends_each_step_after_its_first_update(tiny_model, tmp_path, found):
    """Before it the samples are the policy's own, after it they are further away than the limit."""
    limited = {"name": "ppo", "inner_epochs": 2, "minibatches": 2, "truncated": "end", "update_limit": 1e-6}
    result = run(tiny_model, tmp_path / "run", found, algorithm=limited, run={"steps": 3})
    facts = json.loads((result.folder / "result.json").read_text())
    assert (facts["steps"], facts["updates"], facts["skipped"]) == (3, 3, 3)
    assert [line["lr"] for line in metrics(result.folder)] == pytest.approx([1e-2] * 3)  # half of 2e-2 and 0
    assert min(line["kl/update"] for line in metrics(result.folder)) > 1e-6 / 2


def _stopping_after(step: int) -> Callable[..., None]:
    def notify(self: Session, hook: str, **arguments: object) -> None:
        if arguments.get("step") == step:
            raise KeyboardInterrupt

    return notify


@pytest.mark.parametrize("lacking", [(), (5, 9)])
def test_a_run_stopped_between_steps_goes_on_to_the_same_bytes(tiny_model, tmp_path, found, monkeypatch, lacking):
    """Also where some replies have no score."""
    sections = {
        "algorithm": {"name": "toy_reinforce", "minibatches": 2, "reference": True},
        "reward": {"name": "toy_digits", "broken": list(lacking)},
        "rollout": {"on_missing": "drop_sample"},
    }
    checkpoint = {"steps": 5, "checkpoint": {"every": 2}}
    whole = run(tiny_model, tmp_path / "whole", found, run=checkpoint, **sections)

    monkeypatch.setattr(Session, "_notify", _stopping_after(3))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path / "part", found, run=checkpoint, **sections)
    monkeypatch.undo()
    assert len(list((tmp_path / "part/journal").glob("*.json"))) == 3  # two steps are in a checkpoint, one is not
    Digits.calls.clear()
    part = run(tiny_model, tmp_path / "part", found, resume=True, run=checkpoint, **sections)
    assert len(Digits.calls) == 2  # the third step's scores come from the journal
    for name in ("metrics.jsonl", "model/model.safetensors", "rollouts.parquet"):
        assert (part.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    table = pyarrow.parquet.read_table(part.folder / "rollouts.parquet").to_pylist()
    assert {row["row"] for row in table if not row["used"]} == {*lacking}


@pytest.mark.parametrize("nan", [False, True])
def test_a_missing_score_ends_the_run_and_names_row_and_reply(tiny_model, tmp_path, found, nan):
    reward = {"name": "toy_digits", "broken": [5], "nan": nan}
    with pytest.raises(
        ServiceError, match=r"step [123], row 5: reply 2 of 4 could not be scored: (the scale is broken|.* nan)"
    ):
        run(tiny_model, tmp_path / "run", found, reward=reward)


@pytest.mark.parametrize(("policy", "left"), [("drop_sample", 24 * 4 - 2), ("drop_group", 24 * 4 - 8)])
def test_what_could_not_be_scored_is_left_out_and_counted(tiny_model, tmp_path, found, policy, left, capsys):
    sections = {"reward": {"name": "toy_digits", "broken": [5, 9]}, "rollout": {"on_missing": policy}}
    result = run(tiny_model, tmp_path / "run", found, run={"steps": 3}, **sections)
    assert sum(m["reward/missing"] for m in metrics(result.folder)) == 2
    table = pyarrow.parquet.read_table(result.folder / "rollouts.parquet").to_pylist()
    assert len(table) == 24 * 4
    used, unused = ([row for row in table if row["used"] == wanted] for wanted in (True, False))
    assert len(used) == left
    assert all(row["score"] is not None and row["reason"] is None for row in used)
    lacking = [row for row in unused if row["score"] is None]
    assert [(row["row"], row["reason"]) for row in sorted(lacking, key=lambda row: row["row"])] == [
        (row, "the scale is broken") for row in (5, 9)
    ]
    others = {row["reason"] for row in unused if row["score"] is not None}
    assert others == ({"another reply of its group has no score"} if policy == "drop_group" else set())
    said = re.findall(
        r"step \d, row \d: reply 2 of 4 could not be scored: the scale is broken", capsys.readouterr().out
    )
    assert len(said) in (1, 2)


def test_asking_again_is_counted_and_then_ends_the_run(tiny_model, tmp_path, found):
    sections = {"reward": {"name": "toy_digits", "broken": [5]}, "rollout": {"on_missing": "retry", "retries": 2}}
    with pytest.raises(ServiceError, match="could not be scored 3 times"):
        run(tiny_model, tmp_path / "run", found, run={"steps": 3}, **sections)
    assert Digits.calls[-3:] == [8, 1, 1]  # the whole step, then the group alone


@pytest.mark.parametrize("sampler", [{"name": "plain"}, SLOTS], ids=["plain", "continuous"])
@pytest.mark.parametrize("algorithm", ["toy_reinforce", "toy_greedy"])
def test_rewards_may_be_asked_for_while_others_are_drawn_with_the_same_result(
    tiny_model, tmp_path, found, algorithm, sampler
):
    sections = {"algorithm": {"name": algorithm}, "run": {"steps": 2}, "rollout": {"on_missing": "drop_sample"}}
    sections["sampler"] = {**sampler, "max_new_tokens": 6}
    sections["reward"] = {"name": "toy_digits", "broken": [5, 9, 11]}
    whole = run(tiny_model, tmp_path / "whole", found, **sections)
    sections["rollout"]["overlap"] = 3
    parts = run(tiny_model, tmp_path / "parts", found, **sections)
    assert Digits.calls == [8, 8, 3, 3, 2, 3, 3, 2]
    for name in ("metrics.jsonl", "rollouts.parquet", "model/model.safetensors"):
        assert (whole.folder / name).read_bytes() == (parts.folder / name).read_bytes()
    assert max(m["sampler/gap"] for m in metrics(parts.folder)) < 1e-5  # each reply is beside its own prompt


@pytest.mark.parametrize("drawing", [Met.DrawingPlain, Met.DrawingContinuous, Met.DrawingBackwards])
def test_a_reward_is_at_work_while_replies_are_drawn(tiny_model, tmp_path, found, drawing):
    Met.scoring.clear()
    Met.drawn.clear()
    found.registry.add(Met.Reward, "test", "0")
    found.registry.add(drawing, "test", "0")
    sampler = {"name": drawing.name, "max_new_tokens": 6}
    run(
        tiny_model,
        tmp_path,
        found,
        reward={"name": "toy_met"},
        sampler=sampler,
        run={"steps": 1},
        rollout={"overlap": 2},
    )
    assert Digits.calls == [2, 2, 2, 2]


def test_a_reward_that_fails_ends_the_drawing(tiny_model, tmp_path, found, monkeypatch):
    drawn, failed = [], threading.Event()

    def score(self, groups):
        Digits.calls.append(len(groups))
        failed.set()
        raise ServiceError("the scale is gone")

    class Counting(Plain):
        name = "toy_counting"

        def open(self, model, other=None, mix=0.0):
            for_each = super().open(model, other, mix)

            def drawer(requests):
                for i, one in enumerate(for_each(requests)):
                    drawn.append(i)
                    assert i < 8 or failed.wait(60)
                    yield one

            return drawer

    monkeypatch.setattr(Digits, "score", score)
    found.registry.add(Counting, "test", "0")
    settings = {"sampler": {"name": "toy_counting", "max_new_tokens": 6}, "rollout": {"overlap": 1}}
    with pytest.raises(ServiceError, match="the scale is gone"):
        run(tiny_model, tmp_path, found, **settings)
    assert len(drawn) < 32  # eight groups of four
    assert len(Digits.calls) < 8


def test_what_cannot_be_scored_while_others_are_drawn_ends_the_run_all_the_same(tiny_model, tmp_path, found):
    sections = {"reward": {"name": "toy_digits", "broken": [5]}, "rollout": {"overlap": 2}}
    with pytest.raises(ServiceError, match=r"step [123], row 5: reply 2 of 4 could not be scored"):
        run(tiny_model, tmp_path / "run", found, **sections)


def test_groups_that_are_not_kept_are_replaced_by_other_prompts(tiny_model, tmp_path, found):
    algorithm = {"name": "toy_picky"}
    result = run(tiny_model, tmp_path / "run", found, algorithm=algorithm, run={"steps": 1})
    (line,) = metrics(result.folder)
    assert line["groups/refused"] == 3
    assert len(Reinforce.kept) == 11
    assert len(set(Reinforce.kept)) == 11  # no prompt twice
    table = pyarrow.parquet.read_table(result.folder / "rollouts.parquet").to_pylist()
    used, refused = ({row["row"] for row in table if row["used"] == wanted} for wanted in (True, False))
    assert (len(used), len(refused)) == (8, 3)
    assert all(row["score"] is not None for row in table)
    assert {(row["used"], row["reason"]) for row in table} == {(True, None), (False, "its group was refused")}
    assert result.budget["sampled"] == sum(len(row["ids"]) for row in table)  # what was not kept was drawn too


def test_greedy_and_reference_draws_come_with_their_roles(tiny_model, tmp_path, found):
    run(tiny_model, tmp_path / "run", found, algorithm={"name": "toy_greedy"}, run={"steps": 1})
    for group in Reinforce.kept:
        assert [c.source for c in group.completions] == ["policy", "policy", "policy", "reference"]
        assert len(group.of(Role.OPPONENT)) == 2
    by_prompt = {}
    for group in Reinforce.kept:
        by_prompt.setdefault(group.prompt, set()).add(group.of(Role.OPPONENT)[0].text)
    assert all(len(texts) == 1 for texts in by_prompt.values())  # the same prompt, the same greedy reply


def test_a_paired_method_runs_on_pairs_of_its_own_samples(tiny_model, tmp_path, found):
    sections = {"algorithm": {"name": "dpo", "beta": 0.1}, "rollout": {"n": 6}}
    result = run(tiny_model, tmp_path / "run", found, run={"steps": 10}, **sections)
    rewards = [m["reward/mean"] for m in metrics(result.folder)]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.05
    assert metrics(result.folder)[0]["loss/total"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("reference", "same"),
    [
        ({"every": 2, "mix": 1.0}, [True, False, True, False, True]),
        ({"mode": "resident"}, [True, False, False, False, False]),
    ],
    ids=["rounds of two steps", "one round"],
)
def test_a_round_of_iterative_dpo_begins_at_the_policy_that_the_last_one_ended_with(
    tiny_model, tmp_path, found, monkeypatch, reference, same
):
    """At the first step of a round the reference's log-probabilities are the policy's own."""
    method, gaps = found.find("algorithm", "iterative_dpo"), []
    loss = method.loss

    def measured(self, batch, policy):
        gaps.append((policy.logps.detach() - batch.reference_logps)[batch.mask].abs().max().item())
        return loss(self, batch, policy)

    monkeypatch.setattr(method, "loss", measured)
    sections = {"algorithm": {"name": "iterative_dpo"}, "reference": reference, "run": {"steps": 5}}
    run(tiny_model, tmp_path / "run", found, **sections)
    assert [gap < 1e-5 for gap in gaps] == same
    assert all(gap < 1e-5 or gap > 1e-3 for gap in gaps)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"reward": None}, "reward: algorithm `toy_reinforce` learns from scored replies, and nothing scores them"),
        ({"algorithm": {"name": "dpo"}}, "reward: algorithm `dpo` learns from rows: no reply is scored"),
        ({"rollout": {"n": 3}}, "rollout.n: algorithm `toy_reinforce` says itself how many replies it draws"),
        ({"sampler": {"name": "plain", "greedy": True}}, "sampler: with these settings replies come from another"),
        (
            {"reference": {"mode": "cached"}, "algorithm": {"name": "toy_reinforce", "reference": True}},
            "reference: what is drawn while training cannot be scored before",
        ),
        ({"critic": {"path": "MODEL"}}, "critic: algorithm `toy_reinforce` uses no values"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(tiny_model, tmp_path, found, sections, message):
    if "critic" in sections:
        sections = {"critic": {"path": str(tiny_model)}}
    with pytest.raises(ConfigError, match=message):
        run(tiny_model, tmp_path / "run", found, **sections)
    assert not (tmp_path / "run").exists()


def test_what_a_sampler_starts_ends_with_the_run_even_when_the_run_fails(tiny_model, tmp_path, found):
    held = {"sampler": {"name": "toy_held", "max_new_tokens": 6}, "run": {"steps": 1}}
    run(tiny_model, tmp_path / "whole", found, **held)
    assert Held.seen == [tmp_path / "whole/held", "open", "over"]
    Held.seen.clear()
    with pytest.raises(ServiceError):
        run(tiny_model, tmp_path / "failed", found, reward={"name": "toy_digits", "broken": list(range(100))}, **held)
    assert Held.seen == [tmp_path / "failed/held", "open", "over"]
