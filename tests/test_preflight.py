from __future__ import annotations

import json

import jsonschema
import pytest

from prefopt.api import Algorithm, Comparison, Needs
from prefopt.config import Document, resolved, run_from, schema
from prefopt.config.yaml import parse
from prefopt.errors import ConfigError, DataError, PluginError
from prefopt.plugins import load
from prefopt.preflight import check, describe
from prefopt.registry import field_docs
from prefopt.testing.tiny import tiny_config, tiny_rows, write_rows


@pytest.fixture
def found():
    return load()


def config(found, tiny_model, tmp_path, **sections):
    return tiny_config(tiny_model, tmp_path / "run", sections, found)


def test_a_good_configuration_passes_and_is_described(found, tiny_model, tmp_path):
    run = config(found, tiny_model, tmp_path, algorithm={"name": "dpo"})
    check(run, found.registry)
    expected = "dpo (prefopt-dpo 0.1.0), on comparison rows from jsonl, needs reference_logps, logps"
    assert describe(run, found.registry) == expected


def test_model_folders(found, tiny_model, tmp_path):
    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    problems = {
        "./nothing/here": "there is no folder",
        str(tmp_path / "empty"): "has no config.json",
        str(pickled): "has no safetensors weights",
        "world:nowhere": "unknown world `nowhere`",
    }
    for path, what in problems.items():
        with pytest.raises(ConfigError, match=what) as caught:
            check(config(found, tiny_model, tmp_path, model={"path": path}), found.registry)
        if path == str(pickled):
            assert "Convert pytorch_model.bin to safetensors" in caught.value.problems[0].fix
    check(config(found, tiny_model, tmp_path, model={"path": "someone/some-model"}), found.registry)  # a hub name
    check(config(found, tiny_model, tmp_path, model={"path": "./made/later"}), found.registry, {"./made/later": None})


def test_adapters_need_peft_and_a_reference_that_stays(found, tiny_model, tmp_path, monkeypatch):
    model = {"path": str(tiny_model), "lora": {"rank": 2}}
    moving = {"every": 2, "mix": 0.5}
    run = config(found, tiny_model, tmp_path, model=model, algorithm={"name": "dpo"}, reference=moving)
    with pytest.raises(ConfigError, match="a moving reference mixes weights") as caught:
        check(run, found.registry)
    assert caught.value.problems[0].where == "reference.every"
    monkeypatch.setattr("prefopt.preflight.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="adapters need peft, which is not installed"):
        check(run, found.registry)


def test_a_reference_that_nothing_uses_is_refused(found, tiny_model, tmp_path):
    run = config(found, tiny_model, tmp_path, reference={"mode": "resident"})
    with pytest.raises(ConfigError, match="algorithm `sft` uses no reference"):
        check(run, found.registry)


def test_a_reference_elsewhere_must_exist(found, tiny_model, tmp_path):
    run = config(found, tiny_model, tmp_path, algorithm={"name": "dpo"}, reference={"path": "./not/there"})
    with pytest.raises(ConfigError) as caught:
        check(run, found.registry)
    assert caught.value.problems[0].where == "reference.path"


def test_rows_that_cannot_feed_the_algorithm(found, tiny_model, tmp_path):
    data = write_rows(tmp_path / "demos.jsonl", tiny_rows("demonstration"))
    run = config(found, tiny_model, tmp_path, algorithm={"name": "dpo"}, data={"source": "jsonl", "path": str(data)})
    with pytest.raises(DataError, match="a demonstration cannot become a comparison"):
        check(run, found.registry)


def test_rows_without_a_number_the_algorithm_asks_for(found, tiny_model, tmp_path):
    rows = tiny_rows("comparison")
    del rows[3]["margin"], rows[5]["margin"]
    data = {"source": "jsonl", "path": str(write_rows(tmp_path / "pairs.jsonl", rows))}
    run = config(found, tiny_model, tmp_path, algorithm={"name": "reward_model", "margin": True}, data=data)
    with pytest.raises(DataError) as caught:
        check(run, found.registry)
    path = data["path"]
    assert [p.where for p in caught.value.problems] == [f"data, row 3, {path}:4", f"data, row 5, {path}:6"]


def test_held_out_rows_are_checked_too(found, tiny_model, tmp_path):
    evaluation = {"every": 1, "data": {"source": "jsonl", "path": str(tmp_path / "none.jsonl")}}
    with pytest.raises(DataError, match="cannot read the file"):
        check(config(found, tiny_model, tmp_path, eval=evaluation), found.registry)


def test_everything_wrong_is_reported_at_once(found, tiny_model, tmp_path):
    run = config(
        found,
        tiny_model,
        tmp_path,
        model={"path": "./nothing"},
        data={"source": "jsonl", "path": str(tmp_path / "none.jsonl")},
        reference={"mode": "resident"},
    )
    with pytest.raises(ConfigError) as caught:
        check(run, found.registry)
    assert len(caught.value.problems) == 3


class Other(Algorithm):
    name, eats = "dpo", Comparison

    strength: float = 0.5


def test_a_name_that_two_plugins_offer_can_be_qualified(found, tiny_model, tmp_path):
    found.registry.add(Other, "Other_Plugin", "2.0")
    run = config(found, tiny_model, tmp_path, algorithm={"name": "prefopt-dpo:dpo", "beta": 0.3})
    check(run, found.registry)
    assert describe(run, found.registry).startswith("dpo (prefopt-dpo 0.1.0)")
    data = resolved(run)
    assert data["algorithm"] == {"name": "prefopt-dpo:dpo", "beta": 0.3, "label_smoothing": 0.0}
    assert run_from(Document(data), found.find) == run
    other = config(found, tiny_model, tmp_path, algorithm={"name": "other-plugin:dpo"})
    assert type(other.algorithm) is Other
    assert describe(other, found.registry).startswith("dpo (Other_Plugin 2.0)")
    made = schema([entry.cls for entry in found.registry.all()], field_docs)
    jsonschema.Draft202012Validator(made).validate(resolved(other))


def test_problems_have_their_place_in_the_document(found, tiny_model, tmp_path):
    data = write_rows(tmp_path / "demos.jsonl", tiny_rows("demonstration"))
    text = f"""
prefopt: 1
model: {{path: ./nothing}}
data: {{source: jsonl, path: {data}}}
algorithm: {{name: dpo}}
run: {{dir: {tmp_path}/run}}
"""
    document = parse(text, "run.yaml")
    with pytest.raises(ConfigError) as caught:
        check(run_from(document, found.find), found.registry, where=document.where)
    assert [(p.where, p.what) for p in caught.value.problems] == [
        ("run.yaml:3:9", "`model.path`: there is no folder `./nothing`"),
        ("run.yaml:4:1", "`data`: a demonstration cannot become a comparison"),
    ]


def test_a_missing_model_names_the_run_that_makes_it(found, tiny_model, tmp_path):
    (tmp_path / "a.yaml").write_text("not: [")
    (tmp_path / "sft.yaml").write_text(f"run: {{dir: {tmp_path}/runs/sft}}")
    for name, fix in (("sft", f"`prefopt train {tmp_path}/sft.yaml` makes it."), ("ppo", "the model of the run in")):
        run = config(found, tiny_model, tmp_path, model={"path": f"{tmp_path}/runs/{name}/model"})
        with pytest.raises(ConfigError) as caught:
            check(run, found.registry, beside=tmp_path)
        assert fix in caught.value.problems[0].fix


class Live(Algorithm):
    name, eats = "live", Comparison

    def needs(self):
        return Needs(during={"logps", "token_kl"})


@pytest.mark.parametrize("settings", [{"mode": "cached"}, {"store": "kept"}])
def test_distributions_cannot_be_kept(found, tiny_model, tmp_path, settings):
    found.registry.add(Live, "test", "0")
    run = config(found, tiny_model, tmp_path, algorithm={"name": "live"}, reference=settings)
    with pytest.raises(ConfigError, match="compares whole distributions"):
        check(run, found.registry)
    check(
        config(found, tiny_model, tmp_path, algorithm={"name": "live"}, reference={"mode": "resident"}), found.registry
    )


def test_a_world_is_no_reference(found, tiny_model, tmp_path):
    run = config(found, tiny_model, tmp_path, algorithm={"name": "dpo"}, reference={"path": "world:replies"})
    with pytest.raises(ConfigError, match="is built by the run that trains it"):
        check(run, found.registry)


class Greedy(Algorithm):
    name, eats = "greedy", Comparison

    def needs(self):
        return Needs(during={"scores", "logps"})


class Failing(Algorithm):
    name, eats = "failing", Comparison

    def needs(self):
        return json.loads("{")


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Failing, "Failing.needs\\(\\) failed"),
        (Greedy, "asks for scores and for logps"),
    ],
)
def test_algorithms_the_engine_cannot_serve(found, tiny_model, tmp_path, cls, what):
    found.registry.add(cls, "test", "0")
    with pytest.raises(PluginError, match=what):
        check(config(found, tiny_model, tmp_path, algorithm={"name": cls.name}), found.registry)


class Remembering(Algorithm):
    name, eats = "remembering", Comparison

    def needs(self):
        return Needs(before={"sampled_logps"})


def test_what_a_sampler_says_cannot_be_asked_of_rows(found, tiny_model, tmp_path):
    found.registry.add(Remembering, "test", "0")
    with pytest.raises(ConfigError, match="asks for what a sampler says of its draws, and draws nothing"):
        check(config(found, tiny_model, tmp_path, algorithm={"name": "remembering"}), found.registry)
