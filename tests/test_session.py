"""Whole runs of a tiny model: what they write, what they refuse, how they end."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt import session
from prefopt.api import Algorithm, Comparison, Loss, Needs
from prefopt.cli.app import main
from prefopt.config import load_run
from prefopt.engine.forward import Scorer
from prefopt.engine.reference import Cached
from prefopt.engine.services import EngineServices
from prefopt.errors import ConfigError, DataError, Preempted, ResourceError
from prefopt.plugins import load
from prefopt.rows import Completion, Demonstration, Role, Rollout
from prefopt.session import train
from prefopt.testing.tiny import build_tiny, tiny_config, tiny_rows, write_rows


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_run_writes_what_it_promises(train_tiny):
    result = train_tiny(algorithm={"name": "dpo"}, eval={"every": 2, "samples": 3, "rows": 5})
    assert result.outcome == "finished"
    folder = result.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    metrics = lines(folder / "metrics.jsonl")
    assert [(m["step"], "eval/loss/total" in m) for m in metrics] == [
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
    ]
    assert {"loss/total", "reward/accuracy", "gradient/norm", "lr", "epoch"} <= metrics[0].keys()
    assert {"eval/kl/sequence", "eval/reward/accuracy", "eval/completion/tokens"} <= metrics[2].keys()
    assert not any("seconds" in m or "memory" in m for m in metrics)
    assert {"step", "prompt", "completion", "finished", "row"} == lines(folder / "samples.jsonl")[0].keys()
    timings = lines(folder / "timings.jsonl")
    assert timings[-1]["peak_memory_bytes"] > 0
    info = json.loads((folder / "run.json").read_text())
    assert info["algorithm"] == {"name": "dpo", "distribution": "prefopt-dpo", "version": "0.1.0"}
    assert [len(h) for h in info["data"].values()] == [64]


def test_a_run_folder_holds_no_pickle(train_tiny):
    folder = train_tiny(algorithm={"name": "dpo"}, eval={"every": 2, "samples": 1}).folder
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".jinja"}


def test_the_result_loads_with_transformers_and_has_a_card(train_tiny):
    result = train_tiny(algorithm={"name": "dpo", "beta": 0.3})
    model, tokenizer = (c.from_pretrained(result.model) for c in (AutoModelForCausalLM, AutoTokenizer))
    saved = load_file(max(result.folder.glob("checkpoints/step-*")) / "model.safetensors")
    for name, x in model.state_dict().items():
        assert torch.equal(x, saved[f"network.{name}"]), name
    assert tokenizer("abc")["input_ids"]
    card = (result.model / "README.md").read_text("utf-8")
    assert "library_name: transformers" in card
    assert "# dpo on" in card
    assert "beta: 0.3" in card
    assert "sha256" in card
    assert "| `loss/total` |" in card


@pytest.mark.parametrize("same_padding", [False, True], ids=["own padding", "padding is the end token"])
def test_a_reward_model_reloads_as_a_classifier_with_the_same_scores(train_tiny, tmp_path, same_padding):
    model = tmp_path / "model"
    build_tiny(model)
    if same_padding:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(model)
    result = train_tiny(algorithm={"name": "reward_model"}, model={"path": str(model)})
    texts = ["1 2 3", "7", "4 4 4 4 4"]
    rollout = Rollout(prompt="count from 1: ", completions=tuple(map(Completion, texts)))
    ours = [s.value for s in EngineServices(0).scorer(str(result.model))([rollout])[0]]

    network = AutoModelForSequenceClassification.from_pretrained(result.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert network.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer([rollout.prompt + t + tokenizer.eos_token for t in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    assert ours == pytest.approx(theirs.tolist(), abs=1e-5)
    assert len(set(ours)) == 3


def test_the_score_head_depends_on_the_seed(train_tiny, tiny_model):
    heads = []
    for seed in (0, 1):
        run = train_tiny(
            str(seed), algorithm={"name": "reward_model"}, run={"steps": 1, "seed": seed}, optim={"lr": 1e-9}
        )
        heads.append(load_file(run.model / "model.safetensors")["score.weight"])
    assert not torch.allclose(*heads)
    assert all(0.05 < float(head.std()) < 0.5 for head in heads)  # N(0, 1/25): 24 inputs


def test_training_a_reward_model_goes_on_from_one(train_tiny):
    first = train_tiny("first", algorithm={"name": "reward_model"})
    second = train_tiny(
        "second", algorithm={"name": "reward_model"}, model={"path": str(first.model)}, optim={"lr": 1e-12}
    )
    a, b = (load_file(r.model / "model.safetensors")["score.weight"] for r in (first, second))
    assert torch.allclose(a, b, atol=1e-6)


def test_bfloat16_trains_float32_weights(train_tiny):
    result = train_tiny(algorithm={"name": "dpo"}, optim={"precision": "bfloat16"})
    exact = train_tiny("exact", algorithm={"name": "dpo"})
    assert all(x.dtype == torch.float32 for x in load_file(result.model / "model.safetensors").values())
    a, b = (lines(r.folder / "metrics.jsonl") for r in (result, exact))
    assert a[0]["loss/total"] == pytest.approx(b[0]["loss/total"], abs=0.02)
    assert a[-1]["loss/total"] != b[-1]["loss/total"]


@pytest.mark.parametrize(("precision", "times"), [("bfloat16", 8), ("bfloat16", 2), ("float32", 8)])
def test_a_slow_precision_is_told_of_before_anything_is_computed(
    tiny_model, tmp_path, plugins, monkeypatch, precision, times
):
    seconds = {torch.float32: 1.0, torch.bfloat16: float(times)}
    monkeypatch.setattr("prefopt.engine.forward._product_seconds", seconds.__getitem__)
    said: list[str] = []
    scored = Cached.share
    monkeypatch.setattr(Cached, "share", lambda *given: (said.append("the reference"), scored(*given))[1])
    settings = {"algorithm": {"name": "dpo"}, "run": {"steps": 1}, "optim": {"precision": precision}}
    train(tiny_config(tiny_model, tmp_path / "run", settings, plugins), plugins, warn=said.append)
    slow = "a matrix product in bfloat16 takes 8 times as long as in float32 on this CPU"
    assert said == [slow] * (precision == "bfloat16" and times == 8) + ["the reference"]


def test_a_run_stops_early_and_exports_its_best_model(train_tiny):
    """With a large learning rate the held-out margin of a fixed direction soon falls."""
    result = train_tiny(
        algorithm={"name": "dpo"},
        run={"steps": 40},
        eval={"every": 1, "rows": 6, "metric": "reward/chosen", "goal": "max", "patience": 2, "keep_best": True},
        optim={"lr": 0.05},
    )
    assert result.outcome == "stopped"
    facts = json.loads((result.folder / "result.json").read_text())
    values = {
        m["step"]: m["eval/reward/chosen"] for m in lines(result.folder / "metrics.jsonl") if "eval/loss/total" in m
    }
    assert facts["steps"] == max(values) == facts["best_step"] + 2 < 40
    assert values[facts["best_step"]] == max(values.values()) == facts["best"]
    best = load_file(result.folder / f"checkpoints/step-{facts['best_step']:08d}/model.safetensors")
    exported = load_file(result.model / "model.safetensors")
    assert all(torch.equal(x, best[f"network.{name}"]) for name, x in exported.items())


def test_an_unknown_metric_to_watch_is_named(train_tiny, tmp_path):
    with pytest.raises(ConfigError, match="eval.metric: `reward/acuracy` is not measured\n.*mean `reward/accuracy`"):
        train_tiny(algorithm={"name": "dpo"}, eval={"every": 1, "metric": "reward/acuracy"})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # before the first step


def test_a_task_that_does_not_fit_the_run_is_refused_before_the_first_step(train_tiny, tmp_path):
    tasks = [{"name": "reward_quality"}, {"name": "length"}]
    with pytest.raises(ConfigError, match="a task asks for samples of the policy") as caught:
        train_tiny(algorithm={"name": "reward_model"}, eval={"every": 4, "tasks": tasks})
    assert caught.value.problems[0].where == "eval.tasks, task `length`"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_rehearsal_of_the_evaluation_leaves_no_trace(train_tiny):
    sections = {"algorithm": {"name": "dpo"}, "eval": {"every": 2, "samples": 2, "rows": 4}}
    plain = train_tiny("plain", **sections)
    tasks = {**sections["eval"], "tasks": [{"name": "length"}], "metric": "length"}
    rehearsed = train_tiny("rehearsed", **{**sections, "eval": tasks})
    first, second = (json.loads((r.folder / "result.json").read_text()) for r in (plain, rehearsed))
    assert first == second
    before, after = (lines(r.folder / "metrics.jsonl") for r in (plain, rehearsed))
    assert [{k: m[k] for k in m if k not in ("eval/length", "eval/finished")} for m in after] == before
    assert lines(plain.folder / "samples.jsonl") == lines(rehearsed.folder / "samples.jsonl")


def test_held_out_rows_are_not_trained_on(train_tiny):
    """A reply that only a held-out row has is never seen, so its loss stays where the base model put it."""
    result = train_tiny(
        algorithm={"name": "sft"},
        eval={"every": 4, "holdout": 0.25},
        run={"steps": None, "epochs": 1},
        optim={"batch_size": 6},
    )
    counts = json.loads((result.folder / "result.json").read_text())["steps"]
    assert counts == 3  # 18 of 24 rows in steps of 6


def test_rows_too_few_to_hold_out(train_tiny, tmp_path):
    data = write_rows(tmp_path / "one.jsonl", tiny_rows("demonstration", 1))
    with pytest.raises(DataError, match="too few to hold any out"):
        train_tiny(data={"source": "jsonl", "path": str(data)}, eval={"every": 1})


def test_dropped_and_merged_rows_are_counted(train_tiny, tmp_path):
    rows = tiny_rows("demonstration", 8)
    rows[2]["completion"] = "9" * 60
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "long.jsonl", rows)), "max_length": 50}
    with pytest.raises(DataError, match="more than data.max_length = 50") as caught:
        train_tiny("stop", data=data)
    assert caught.value.problems[0].where.startswith("row 2, ")
    result = train_tiny("drop", data={**data, "overflow": "drop"}, run={"steps": 2})
    assert json.loads((result.folder / "result.json").read_text())["rows"] == {"rows/dropped": 2}


def test_sequences_longer_than_the_model_reads_are_refused(train_tiny, tmp_path):
    rows = tiny_rows("demonstration", 8)
    rows[1]["completion"] = "9" * 200
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "long.jsonl", rows))}
    with pytest.raises(DataError, match="more than data.max_length = 128"):
        train_tiny(data=data)


def test_a_length_the_model_cannot_read_is_refused(train_tiny, tmp_path):
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", tiny_rows("demonstration", 8)))}
    for sections in (
        {"data": {**data, "max_length": 129}},
        {"eval": {"every": 1, "data": {**data, "max_length": 129}}},
    ):
        with pytest.raises(ConfigError, match="129 tokens are more than the 128 the model can read") as caught:
            train_tiny(next(iter(sections)), **sections)
        assert caught.value.problems[0].where.endswith("data.max_length")


def test_a_reward_model_says_what_it_cannot_read(train_tiny):
    result = train_tiny(algorithm={"name": "reward_model"}, run={"steps": 1})
    rollout = Rollout(prompt="9" * 100, completions=(Completion("9" * 40),))
    with pytest.raises(DataError, match="141 tokens, more than the 128 the reward model can read"):
        EngineServices(0).scorer(str(result.model))([rollout])


def test_a_step_without_rows_changes_nothing_but_a_count(train_tiny, tmp_path):
    rows = [{**row, "preference": 0.5} for row in tiny_rows("comparison", 4)]
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "ties.jsonl", rows))}
    result = train_tiny(algorithm={"name": "dpo"}, data=data, run={"steps": 2}, optim={"batch_size": 4})
    facts = json.loads((result.folder / "result.json").read_text())
    assert (facts["updates"], facts["skipped"], facts["rows"]) == (0, 2, {"rows/ties": 8})


def test_a_folder_is_used_once(train_tiny):
    train_tiny(algorithm={"name": "sft"})
    with pytest.raises(ConfigError, match="holds a finished run"):
        train_tiny(algorithm={"name": "sft"})


def test_an_unfinished_folder_is_resumed_and_not_overwritten(train_tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        train_tiny(algorithm={"name": "sft"})
    assert "prefopt resume" in caught.value.problems[0].fix


def test_two_runs_cannot_share_a_folder(tiny_model, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        plugins = load()
        with pytest.raises(ResourceError, match="in use by process 4711"):
            train(tiny_config(tiny_model, tmp_path / "run", {}, plugins), plugins)


class Unstable(Algorithm):
    name, eats = "unstable", Comparison

    def needs(self):
        return Needs(during=frozenset({"logps"}))

    def loss(self, batch, policy):
        value = batch.mean(policy.logps, "tokens")
        return Loss(value * float("inf") if value.item() < -1e-9 else value)


def test_numbers_that_are_not_finite_stop_the_run_before_the_update(tiny_model, tmp_path):
    plugins = load()
    plugins.registry.add(Unstable, "test", "0")
    config = tiny_config(tiny_model, tmp_path / "run", {"algorithm": {"name": "unstable"}}, plugins)
    with pytest.raises(ResourceError, match=r"loss/total is -inf in step 1; the model was not updated"):
        train(config, plugins)


class Neighbours(Algorithm):
    """Compares each completion with that of the next row of its step, which is another one in every epoch."""

    name, eats = "neighbours", Demonstration

    def needs(self):
        return Needs(before=frozenset({"reference_logps"}), during=frozenset({"logps"}))

    def arrange(self, rows):
        own = super().arrange(rows)
        moved = zip(own, own[1:] + own[:1], strict=True)
        return [*own, *(replace(s, completion=t.completion, role=Role.PROBE, group=s.group) for s, t in moved)]

    def loss(self, batch, policy):
        return Loss(batch.mean(policy.logps - batch.reference_logps, "tokens"))


def test_what_a_later_epoch_puts_together_is_scored_before_the_reference_goes(tiny_model, tmp_path):
    plugins = load()
    plugins.registry.add(Neighbours, "test", "0")
    sections = {"algorithm": {"name": "neighbours"}, "run": {"steps": 8}}
    result = train(tiny_config(tiny_model, tmp_path / "run", sections, plugins), plugins)
    assert result.outcome == "finished"


class Anchored(Algorithm):
    """Holds whole distributions near the reference's."""

    name, eats = "anchored", Comparison

    def needs(self):
        return Needs(during=frozenset({"logps", "token_kl"}))

    def loss(self, batch, policy):
        kl = batch.mean(policy.token_kl, "tokens")
        return Loss(0.1 * kl - batch.mean(policy.logps, "chosen_tokens"), {"kl": kl})


def test_whole_distributions_are_compared_with_a_reference_in_memory(tiny_model, tmp_path):
    """0 before the first update, above it later, the same on both paths, and its forward passes are counted."""
    plugins = load()
    plugins.registry.add(Anchored, "test", "0")
    found = {}
    for forward in ("fast", "plain"):
        sections = {"algorithm": {"name": "anchored"}, "run": {"steps": 3}, "optim": {"forward": forward, "lr": 1e-2}}
        result = train(tiny_config(tiny_model, tmp_path / forward, sections, plugins), plugins)
        lines = (tmp_path / forward / "metrics.jsonl").read_text("utf-8").splitlines()
        found[forward] = [json.loads(line)["kl"] for line in lines]
        assert result.budget["forward"] == result.budget["backward"] > 0
    assert found["fast"] == pytest.approx(found["plain"], abs=1e-5)
    assert abs(found["fast"][0]) < 1e-6
    assert found["fast"][2] > 1e-3


@pytest.mark.parametrize("forward", ["fast", "plain"])
@pytest.mark.parametrize("name", ["dpo", "reward_model", "sft"])
def test_checkpointed_gradients_train_the_same_model(tiny_model, tmp_path, name, forward):
    plugins, found = load(), {}
    for again in (False, True):
        optim = {"forward": forward, "lr": 1e-2, "gradient_checkpointing": again}
        sections = {"algorithm": {"name": name}, "run": {"steps": 2}, "optim": optim}
        result = train(tiny_config(tiny_model, tmp_path / f"run{again:d}", sections, plugins), plugins)
        found[again] = load_file(result.model / "model.safetensors")
    for key, x in found[False].items():
        assert torch.allclose(x, found[True][key], atol=1e-5), key


@pytest.mark.parametrize(
    ("name", "forward", "expected"),
    [("dpo", "fast", [True]), ("reward_model", "fast", [False]), ("dpo", "plain", [])],
)
def test_gradients_stay_in_place_on_the_fast_path_only(tiny_model, tmp_path, monkeypatch, name, forward, expected):
    asked, accumulate = [], Scorer.accumulate_in_place
    monkeypatch.setattr(
        Scorer,
        "accumulate_in_place",
        lambda self, head_is_used: asked.append(head_is_used) or accumulate(self, head_is_used),
    )
    plugins = load()
    sections = {"algorithm": {"name": name}, "run": {"steps": 1}, "optim": {"forward": forward}}
    train(tiny_config(tiny_model, tmp_path / "run", sections, plugins), plugins)
    assert asked == expected


class Choosy(Algorithm):
    """Says of each update what `VERDICTS` says."""

    name, eats = "choosy", Comparison

    def needs(self):
        return Needs(during=frozenset({"logps"}))

    def loss(self, batch, policy):
        return Loss(-batch.mean(policy.logps, "tokens"), {"calls": batch.mean(batch.weight, "sequences")})

    def prepare(self, batch, ctx):
        ctx.state["seen"] = ctx.state.get("seen", torch.zeros(())) + 1
        ctx.record("seen", ctx.state["seen"])
        return batch

    def accept(self, metrics):
        return VERDICTS.pop(0)


VERDICTS: list[str] = []


def test_an_algorithm_may_leave_out_updates(tiny_model, tmp_path):
    VERDICTS[:] = ["step", "skip", "step", "stop", "step"]
    plugins = load()
    plugins.registry.add(Choosy, "test", "0")
    sections = {"algorithm": {"name": "choosy"}, "run": {"steps": 5}, "eval": {"every": 1, "rows": 4}}
    result = train(tiny_config(tiny_model, tmp_path / "run", sections, plugins), plugins)
    facts = json.loads((result.folder / "result.json").read_text())
    assert (facts["outcome"], facts["steps"], facts["updates"], facts["skipped"]) == ("finished", 5, 3, 2)
    train_lines = [m for m in lines(result.folder / "metrics.jsonl") if "eval/loss/total" not in m]
    assert [m["seen"] for m in train_lines] == [1, 2, 3, 4, 5]  # evaluation does not advance the state
    assert [m["lr"] > 0 for m in train_lines] == [True, False, True, False, True]


def test_the_learning_rate_counts_updates_and_not_steps(tiny_model, tmp_path):
    VERDICTS[:] = ["step", "skip", "step", "step"]
    plugins = load()
    plugins.registry.add(Choosy, "test", "0")
    sections = {"algorithm": {"name": "choosy"}, "optim": {"schedule": "linear", "warmup": 0.0, "lr": 0.1}}
    result = train(tiny_config(tiny_model, tmp_path / "run", sections, plugins), plugins)
    rates = [m["lr"] for m in lines(result.folder / "metrics.jsonl")]
    assert rates == pytest.approx([0.1, 0, 0.075, 0.05])


def test_a_request_to_stop_saves_the_state_and_says_how_to_go_on(tiny_model, tmp_path):
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")

    class Stopper:
        def __call__(self, hook, on_error, **arguments):
            if arguments.get("step") == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    object.__setattr__(plugins, "notify", Stopper())
    config = tiny_config(tiny_model, tmp_path / "run", {"run": {"steps": 6, "checkpoint": {"every": 100}}}, plugins)
    with pytest.raises(Preempted, match="the state is saved"):
        train(config, plugins)
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Namesake(Choosy):
    name = "sft"


def test_a_qualified_name_trains_and_is_kept_for_later(tiny_model, tmp_path):
    plugins = load()
    plugins.registry.add(Namesake, "other", "1")
    sections = {"algorithm": {"name": "prefopt:sft"}, "run": {"steps": 1}}
    result = train(tiny_config(tiny_model, tmp_path / "run", sections, plugins), plugins)
    assert json.loads((result.folder / "run.json").read_text())["algorithm"]["distribution"] == "prefopt"
    assert load_run(result.folder / "config.yaml", plugins.find).algorithm.name == "sft"


def test_what_is_ignored_stays_ignored(tiny_model, tmp_path):
    """As under nohup, whose children go on when the terminal is closed."""
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    seen = []
    object.__setattr__(plugins, "notify", lambda *_, **__: seen.append(signal.getsignal(signal.SIGHUP)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tiny_config(tiny_model, tmp_path / "run", {"run": {"steps": 1}}, plugins), plugins)
        assert set(seen) == {signal.SIG_IGN} == {signal.getsignal(signal.SIGHUP)}
    finally:
        signal.signal(signal.SIGHUP, before)


def test_samples_of_conversations_are_written(train_tiny, tmp_path):
    model = tmp_path / "model"
    build_tiny(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    turns = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2 3"}]
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "talk.jsonl", [{"messages": turns}] * 8))}
    sections = {"model": {"path": str(model)}, "data": data, "eval": {"every": 1, "samples": 1}, "run": {"steps": 1}}
    result = train_tiny(**sections)
    assert lines(result.folder / "samples.jsonl")[0]["prompt"] == turns[:1]


def test_a_folder_with_other_things_in_it_is_left_alone(train_tiny, tmp_path):
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty, and no run: it holds thesis.tex") as caught:
        train_tiny(algorithm={"name": "sft"})
    assert caught.value.problems[0].where == "run.dir"
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o755
    assert len(list((tmp_path / "run").iterdir())) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "memory ran out: CUDA"),
    ],
)
def test_a_full_disk_and_a_full_memory_are_no_bugs(train_tiny, monkeypatch, error, words):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(session, "save", fails)
    with pytest.raises(ResourceError, match=words) as caught:
        train_tiny(run={"steps": 1})
    assert "prefopt resume" in caught.value.problems[0].fix


def test_a_failing_observer_does_not_stop_a_run(tiny_model, tmp_path):
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    plugins.manager.register(Broken(), "tracker")
    warnings: list[str] = []
    result = train(tiny_config(tiny_model, tmp_path / "run", {}, plugins), plugins, warn=warnings.append)
    assert result.outcome == "finished"
    assert warnings == ["observer tracker failed and is ignored: RuntimeError: down"]


class Broken:
    from prefopt.api import hookimpl

    @hookimpl
    def prefopt_run_started(self, run):
        raise RuntimeError("down")

    @hookimpl
    def prefopt_step_finished(self, run):
        raise RuntimeError("still down")


def test_a_world_gives_its_base_model(tmp_path, plugins):
    path = tmp_path / "run.yaml"
    path.write_text(f"""
prefopt: 1
model: {{path: "world:replies"}}
data: {{source: replies, size: 40}}
algorithm: {{name: sft}}
optim: {{lr: 1.0e-2, batch_size: 20}}
run: {{dir: {tmp_path}/run, device: cpu}}
""")
    result = train(load_run(path, plugins.find), plugins)
    assert AutoModelForCausalLM.from_pretrained(result.folder / "base").config.hidden_size == 64
    assert json.loads((result.folder / "result.json").read_text())["steps"] == 2


def test_secrets_are_in_no_byte_of_a_run_folder(tiny_model, tmp_path, monkeypatch):
    """Twenty of them: in variables, in the configuration, in the data, in what the model is told."""
    secrets = [f"planted-secret-{i:02d}-value" for i in range(17)]
    for i, secret in enumerate(secrets):
        monkeypatch.setenv(f"SERVICE_{i}_API_KEY", secret)
    known = ["hf_" + "Ab1" * 8, "sk-" + "Cd2_" * 6, "ghp_" + "Ef3" * 8]
    rows = [
        {**row, "prompt": f"{(secrets + known)[i % 20][:60]} "} for i, row in enumerate(tiny_rows("demonstration", 40))
    ]
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    plugins = load()
    sections = {"data": data, "eval": {"every": 2, "samples": 20, "rows": 20, "holdout": 0.5}}
    config = tiny_config(tiny_model, tmp_path / "run", sections, plugins)
    result = train(config, plugins)
    written = b"".join(path.read_bytes() for path in result.folder.rglob("*") if path.is_file())
    assert (result.folder / "samples.jsonl").read_text().count("[redacted]") >= 20
    assert [s for s in secrets + known if s.encode() in written] == []


def test_the_command_line_trains_and_reports_exit_codes(tiny_model, tmp_path, monkeypatch, capsys):
    """Train, through a shell; refuse what is finished (2), refuse bad data (3)."""
    data = write_rows(tmp_path / "pairs.jsonl", tiny_rows("comparison"))
    config = tmp_path / "run.yaml"
    config.write_text(f"""
prefopt: 1
model: {{path: {tiny_model}}}
data: {{source: jsonl, path: {data}}}
algorithm: {{name: dpo}}
run: {{dir: {tmp_path}/run, steps: 3, device: cpu}}
""")

    command = [sys.executable, "-m", "prefopt", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"finished: {tmp_path}/run/model" in done.stdout
    assert "dpo: steps 0 to 3" in done.stderr

    def refused(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["prefopt", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    status, said = refused("resume", str(tmp_path / "run"))
    assert (status, "the run is finished" in said) == (2, True)
    data.write_text("{}\n")
    status, said = refused("validate", str(config))
    assert (status, "Traceback" in said) == (3, False)
