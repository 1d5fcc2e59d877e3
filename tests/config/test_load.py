from __future__ import annotations

import copy
import json
import random
import re
import time
from typing import Any

import jsonschema
import pytest

from prefopt.config import anchored, dump, load_run, located, redacted_keys, resolved, run_from, schema
from prefopt.config.load import allowed_plugins
from prefopt.config.yaml import Document, parse
from prefopt.errors import ConfigError, DataError, PrefoptError, Problem, redact
from prefopt.registry import field_docs

TEXT = """\
prefopt: 1
model: {path: ./models/base}
data: {source: jsonl, path: pairs.jsonl.gz, max_length: 512}
algorithm: {name: dpo, beta: 0.1}
optim: {lr: 1e-6, batch_size: 32, betas: [0.9, 0.99]}
eval:
  every: 10
  tasks: [{name: length, samples: 2}, {name: gold_reward, reward: {name: replies_gold}}]
sampler: {name: plain, temperature: 0.7}
run: {dir: runs/dpo, seed: 0, epochs: 1}
"""


def problems(plugins, text: str, *overrides: str) -> dict[str, str]:
    """Where and what, for each problem of a configuration."""
    from prefopt.config.yaml import apply_overrides

    with pytest.raises(ConfigError) as caught:
        run_from(apply_overrides(parse(text, "run.yaml"), overrides), plugins.find)
    return {f"{p.where} {p.what}": p.fix for p in caught.value.problems}


def test_a_configuration_is_typed(plugins):
    config = run_from(parse(TEXT, "run.yaml"), plugins.find)
    assert (config.algorithm.name, config.algorithm.beta) == ("dpo", 0.1)
    assert (config.data.source.path, config.data.max_length) == ("pairs.jsonl.gz", 512)
    assert config.eval.tasks[1].reward.name == "replies_gold"
    assert config.optim.betas == (0.9, 0.99)


@pytest.mark.parametrize("reference", ["{path: other}", "{every: 4, mix: 0.5}", "{mode: resident}", "{store: kept}"])
def test_a_reference_reads_back_as_it_was_written(plugins, run_config, reference):
    """What a run folder holds spells every default out; none of them may count as asked for."""
    config = run_config(
        "prefopt: 1\nmodel: {path: x}\ndata: {source: replies}\nalgorithm: {name: dpo}\n"
        f"reference: {reference}\nrun: {{dir: r}}\n"
    )
    for written in (config, anchored(config)):
        again = run_from(parse(dump(resolved(written)), "resolved"), plugins.find)
        assert again.reference == written.reference


def test_a_resolved_configuration_is_the_same_run(plugins):
    config = run_from(parse(TEXT, "run.yaml"), plugins.find)
    again = run_from(parse(dump(resolved(config)), "resolved"), plugins.find)
    assert again == config


def test_all_problems_at_once_each_with_its_place(plugins):
    bad = TEXT.replace("beta: 0.1", "bta: 0.1").replace("lr: 1e-6", "lr: -1").replace("seed: 0", "sed: 0")
    assert problems(plugins, bad) == {
        "run.yaml:4:24 unknown key `algorithm.bta`": "Did you mean `beta`?",
        "run.yaml:5:9 `optim.lr` must be greater than 0, not -1": "",
        "run.yaml:10:22 unknown key `run.sed`": "Did you mean `seed`?",
    }


@pytest.mark.parametrize(
    ("old", "new", "expected", "fix"),
    [
        ("name: dpo", "name: dop", "run.yaml:4:13 `algorithm`: unknown algorithm `dop`", "Did you mean `dpo`?"),
        (
            "source: jsonl",
            "source: jsnl",
            "run.yaml:3:8 `data.source`: unknown data source `jsnl`",
            "Did you mean `jsonl`?",
        ),
        ("max_length", "max_len", "run.yaml:3:45 unknown key `data.max_len`", "Did you mean `max_length`?"),
        ("batch_size", "per_device_train_batch_size", "optim.per_device_train_batch_size", "called `batch_size` here"),
        ("lr: 1e-6", "beta: 1", "unknown key `optim.beta`", "It belongs into `algorithm`."),
        ("prefopt: 1", "prefopt: 1\nseed: 3", "unknown key `seed`", "It belongs into `run`."),
        ("samples: 2", "sampls: 2", "run.yaml:8:26 unknown key `eval.tasks.0.sampls`", "Did you mean `samples`?"),
        ("replies_gold", "replies_god", "`eval.tasks.1.reward`: unknown reward", "Did you mean `replies_gold`?"),
        ("prefopt: 1", "prefopt: 2", "`prefopt` must be 1, not 2", ""),
        ("epochs: 1", "epochs: 1, steps: 3", "`run` give `epochs` or `steps`, not both", ""),
        ("beta: 0.1", 'beta: "0.1"', '`algorithm.beta` must be a valid number, not "0.1"', ""),
        ("beta: 0.1", "beta: .nan", "`algorithm.beta` must be a finite number", ""),
        ("seed: 0", "seed: true", "`run.seed` must be a valid integer, not true", ""),
        ("runs/dpo", "runs/../x", "a run folder may not climb", ""),
        ("runs/dpo", "runs/My Run", "a name is 1 to 64", ""),
        ("algorithm: {name: dpo, beta: 0.1}", "algorithm: {beta: 0.1}", "write the algorithm as name: NAME", ""),
    ],
)
def test_problems_say_what_where_and_what_to_do(plugins, old, new, expected, fix):
    assert old in TEXT
    found = problems(plugins, TEXT.replace(old, new))
    assert len(found) == 1, found
    ((where, how),) = found.items()
    assert expected in where
    assert fix in how


def test_a_missing_section_is_named(plugins):
    text = "\n".join(line for line in TEXT.splitlines() if not line.startswith("model"))
    assert list(problems(plugins, text)) == ["run.yaml:1:1 `model` is missing"]


def test_a_moving_reference_is_whole_or_not_at_all(plugins):
    for section in ("{every: 4}", "{mix: 0.5}", "{every: 4, mix: 0.5, mode: cached}"):
        assert len(problems(plugins, TEXT + f"reference: {section}\n")) == 1
    assert run_from(parse(TEXT + "reference: {every: 4, mix: 0.5}", "f"), plugins.find).reference.every == 4


def test_secrets_are_not_written_out(plugins):
    text = TEXT.replace("./models/base", "./hf_abcdefghijklmnopqrstuv")
    config = run_from(parse(text, "f"), plugins.find)
    shown = redact(resolved(config))
    assert shown["model"]["path"] == "./[redacted]"
    assert list(redacted_keys(shown)) == [("model", "path")]


def test_a_tilde_is_the_home_folder_everywhere(plugins, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = TEXT.replace("./models/base", "~/base").replace("pairs.jsonl.gz", "~/pairs.jsonl")
    text = text.replace("runs/dpo", "~/runs/dpo") + "reference: {path: ~/other}\n"
    text = text.replace("replies_gold", "reward_model, path: ~/reward")
    config = run_from(parse(text, "f"), plugins.find)
    paths = (config.model.path, config.data.source.path, config.run.dir, config.reference.path)
    assert paths == ("/home/me/base", "/home/me/pairs.jsonl", "/home/me/runs/dpo", "/home/me/other")
    assert config.eval.tasks[1].reward.path == "/home/me/reward"


def test_what_exists_can_be_anchored(plugins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward").mkdir()
    (tmp_path / "pairs.jsonl.gz").touch()
    text = TEXT.replace("replies_gold", "reward_model, path: reward") + "reference: {path: pairs.jsonl.gz}\n"
    config = anchored(run_from(parse(text, "f"), plugins.find))
    assert config.data.source.path == config.reference.path == str(tmp_path / "pairs.jsonl.gz")
    assert config.eval.tasks[1].reward.path == str(tmp_path / "reward")
    assert (config.model.path, config.run.dir) == ("./models/base", "runs/dpo")


def test_problems_that_name_a_key_get_its_place():
    document = parse(TEXT, "run.yaml")
    named = [
        Problem("bad", where, "fix") for where in ("model.path", "data, row 3", "reference.path", "data.jsonl:3", "")
    ]
    found = located(DataError(*named), document.where)
    assert type(found) is DataError
    assert [(p.where, p.what, p.fix) for p in found.problems] == [
        ("run.yaml:2:9", "`model.path`: bad", "fix"),
        ("run.yaml:3:1, row 3", "`data`: bad", "fix"),
        ("run.yaml:1:1", "`reference.path`: bad", "fix"),
        ("data.jsonl:3", "bad", "fix"),
        ("", "bad", "fix"),
    ]
    assert str(found).startswith("run.yaml:2:9: `model.path`: bad\n    fix\n")


def test_what_is_run_again_is_not_redacted(plugins, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "pairs.jsonl.gz")
    config = run_from(parse(TEXT, "f"), plugins.find)
    assert run_from(Document(resolved(config)), plugins.find) == config


def test_allowed_plugins_are_read_before_anything_else(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("plugins: {allow: [prefopt-dpo, x]}\nnonsense: [")
    assert allowed_plugins(path) is None
    path.write_text("plugins: {allow: [prefopt-dpo, x]}\nnonsense: 1")
    assert allowed_plugins(path) == ("prefopt-dpo", "x")
    path.write_text("plugins: {}")
    assert allowed_plugins(path) is None


def test_the_schema_accepts_what_the_reader_accepts_and_names_every_component(plugins):
    components = [entry.cls for entry in plugins.registry.all()]
    made = schema(components, field_docs)
    jsonschema.Draft202012Validator.check_schema(made)
    validator = jsonschema.Draft202012Validator(made)
    good = parse(TEXT, "f").data
    assert validator.is_valid(good)
    for path in (("algorithm", "bta"), ("data", "pth"), ("optim", "x"), ("eval", "tasks", 0, "x"), ("x",)):
        bad = copy.deepcopy(good)
        home = bad
        for key in path[:-1]:
            home = home[key]
        home[path[-1]] = 1
        assert not validator.is_valid(bad), path
    assert {cls.name for cls in components} <= set(re.findall(r'"const": "([\w-]+)"', json.dumps(made)))
    assert "How strongly the policy is held" in json.dumps(made)


# --- mutations -------------------------------------------------------------------------------------------------------

WORDS = ["", "x", "lr", "name", "1e-5", "~", "beta", "source", "..", "é", "\U0001f600", "a" * 300, "nan", "-", "{}"]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    0.5,
    "text",
    "",
    [],
    {},
    [1, [2]],
    {"name": "dpo"},
    {"a": {"b": 1}},
]


def paths(node: Any, prefix: tuple = ()) -> list[tuple]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    return [path for key, value in items for path in ((*prefix, key), *paths(value, (*prefix, key)))]


def mutated(data: Any, draw: random.Random) -> tuple[Any, bool]:
    """The data with one to three changes, and whether a key was added that nothing knows."""
    data, unknown = copy.deepcopy(data), False
    for _ in range(draw.randint(1, 3)):
        places = paths(data)
        if not places:
            return data, unknown
        *parents, last = draw.choice(places)
        home = data
        for key in parents:
            home = home[key]
        action = draw.choice(["value", "delete", "rename", "add", "typo"])
        if action == "value":
            home[last] = copy.deepcopy(draw.choice(VALUES))
        elif action == "delete":
            del home[last]
        elif isinstance(home, dict) and action == "add":
            home[draw.choice(WORDS) + "_unknown"] = draw.choice(VALUES)
            unknown = True
        elif isinstance(home, dict) and isinstance(last, str):
            new = draw.choice(WORDS) if action == "rename" else last[:-1] + draw.choice("xyz") + last[-1:]
            home[new] = home.pop(last)
    return data, unknown


def test_500_mutated_configurations(plugins, tmp_path):
    """No traceback, no unknown key accepted, every rejection located."""
    draw = random.Random(0)
    base = parse(TEXT, "base").data
    path = tmp_path / "run.yaml"
    rejected = accepted = 0
    for _ in range(500):
        data, unknown = mutated(base, draw)
        path.write_text(json.dumps(data))
        try:
            config = load_run(path, plugins.find)
        except PrefoptError as error:
            rejected += 1
            assert error.exit_code in (2, 4)
            assert all(p.where.startswith(f"{path}:") for p in error.problems), error
        else:
            accepted += 1
            assert not unknown, data
            assert run_from(Document(json.loads(json.dumps(resolved(config)))), plugins.find) == config
    assert rejected > 300
    assert accepted > 20


def test_single_typos_get_the_right_suggestion(plugins):
    """Of one-letter typos in keys, at least 95 % are answered with the key that was meant."""
    base = parse(TEXT, "base").data
    draw, right, total = random.Random(1), 0, 0
    for path in paths(base):
        key = path[-1]
        if not isinstance(key, str) or len(key) < 3 or key in ("name", "source", "prefopt"):
            continue
        for _ in range(3):
            at = draw.randrange(1, len(key))
            data = copy.deepcopy(base)
            home = data
            for part in path[:-1]:
                home = home[part]
            home[key[:at] + draw.choice("aeiou") + key[at:]] = home.pop(key)
            total += 1
            try:
                run_from(Document(data), plugins.find)
            except ConfigError as error:
                right += any(f"`{key}`" in p.fix for p in error.problems)
    assert total > 40
    assert right / total >= 0.95


def test_reading_is_quick(plugins, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    began = time.perf_counter()
    load_run(path, plugins.find)
    assert time.perf_counter() - began < 0.5
