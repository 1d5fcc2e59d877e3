"""The data side of a run: what is left out is written down, what is mixed in has its own order."""

from __future__ import annotations

import json
import math

import pytest

from prefopt.data.mix import Mix
from prefopt.data.render import load_tokenizer
from prefopt.engine.inputs import Inputs
from prefopt.engine.services import EngineServices
from prefopt.errors import ConfigError, DataError
from prefopt.plugins import load
from prefopt.testing.tiny import tiny_config, tiny_rows, write_rows


@pytest.fixture
def inputs(tiny_model, tmp_path):
    def make(**sections) -> Inputs:
        config = tiny_config(tiny_model, tmp_path / "run", sections, load())
        return Inputs.of(config, load_tokenizer(str(tiny_model)), 128, EngineServices(0))

    return make


def source(path, rows: list, **settings) -> dict:
    return {"source": "jsonl", "path": str(write_rows(path, rows)), **settings}


def bad_rows() -> list[dict]:
    """24 rows, of which 4 are bad: two cannot be read, one is too long, one has no name anyone knows."""
    rows = tiny_rows("demonstration")
    rows[2] = {"prompt": "p", "completion": 3}
    rows[5] = {"promt": "p", "completion": "c"}
    rows[7]["completion"] = "9" * 200
    rows[11] = {"prompt": "p", "completion": None}
    return rows


def test_bad_rows_are_dropped_counted_and_written_down(train_tiny, tmp_path):
    data = source(tmp_path / "rows.jsonl", bad_rows(), on_bad_row="drop", max_bad_rows=4)
    result = train_tiny(data=data, run={"steps": 3})
    lines = [json.loads(line) for line in (result.folder / "rejects.jsonl").read_text().splitlines()]
    assert [line["class"] for line in lines] == ["not text", "wrong fields", "not text", "tokens"]
    assert [f"rows.jsonl:{n}" in line["where"] for n, line in zip((3, 6, 12, 8), lines, strict=True)] == [True] * 4
    assert "more than data.max_length = 128" in lines[3]["reason"]
    assert json.loads((result.folder / "result.json").read_text())["rows"] == {"rows/dropped": 1}


def test_bad_rows_stop_a_run_before_its_first_step(train_tiny, tmp_path):
    with pytest.raises(DataError) as caught:
        train_tiny(data=source(tmp_path / "rows.jsonl", bad_rows()))
    assert len(caught.value.problems) == 3
    with pytest.raises(DataError, match="3 of 24 rows are bad, and data.max_bad_rows allows 2"):
        train_tiny("b", data=source(tmp_path / "rows.jsonl", bad_rows(), on_bad_row="drop", max_bad_rows=2))


def test_a_cap_without_dropping_is_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match="`max_bad_rows` needs `on_bad_row: drop`"):
        inputs(data=source(tmp_path / "rows.jsonl", bad_rows(), max_bad_rows=2))


def test_what_is_mixed_in_leaves_the_order_of_the_rest_alone(inputs, tmp_path):
    mix = source(tmp_path / "mix.jsonl", tiny_rows("demonstration", 5), weight=0.25, batch_size=2)
    data = source(tmp_path / "pairs.jsonl", tiny_rows("comparison"))
    plain, mixed = (inputs(algorithm={"name": "dpo"}, data=d) for d in (data, {**data, "mix": mix}))
    assert [plain.order.step(s) for s in range(6)] == [mixed.order.step(s) for s in range(6)]
    assert plain.mix is None
    assert mixed.mix.algorithm.weight == 0.25
    assert [len(mixed.mix.step(s).batch) for s in range(3)] == [2, 2, 1]
    assert mixed.verdicts() == [
        "data: preference, plain text: comparison rows",
        "data.mix: prompt_completion, plain text: demonstration rows",
    ]


def test_rows_mixed_in_are_checked_too(inputs, tmp_path):
    rows = tiny_rows("demonstration", 5)
    rows[3]["completion"] = "9" * 200
    made = inputs(data=source(tmp_path / "d.jsonl", tiny_rows("demonstration"), mix=source(tmp_path / "m.jsonl", rows)))
    with pytest.raises(DataError, match=r"row 3, .*m.jsonl:4, .*more than data.max_length"):
        made.check()


def test_held_out_rows_have_no_mix(inputs, tmp_path):
    data = source(tmp_path / "d.jsonl", tiny_rows("demonstration"))
    with pytest.raises(ConfigError, match="leave `mix` out"):
        inputs(data=data, eval={"every": 1, "data": {**data, "mix": data}})


def test_the_loss_of_what_is_mixed_in_is_added_and_told_apart(train_tiny, tmp_path):
    """The first step of DPO costs log 2, for policy and reference are one; the rest is the mixture's."""
    mixed = source(tmp_path / "m.jsonl", tiny_rows("demonstration"))
    result = train_tiny(algorithm={"name": "dpo"}, data={"mix": {**mixed, "weight": 0.5}})
    first = json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss/total"] == pytest.approx(math.log(2) + 0.5 * first["mix/loss/nll"], abs=1e-5)
    assert first["mix/loss/total"] == pytest.approx(0.5 * first["mix/loss/nll"])
    assert result.budget["backward"] > train_tiny("alone", algorithm={"name": "dpo"}).budget["backward"]


def test_every_update_of_a_step_has_rows_of_its_own_mixed_in(train_tiny, tmp_path, monkeypatch):
    """Two passes of two minibatches in each of three steps; the rows become likelier where they weigh something."""
    step, asked, nll = Mix.step, [], {}
    monkeypatch.setattr(Mix, "step", lambda self, number: asked.append(number) or step(self, number))
    sections = {
        "algorithm": {"name": "ppo", "inner_epochs": 2, "minibatches": 2, "truncated": "end", "value_weight": 0.2},
        "reward": {"name": "repetition", "n": 1, "unit": "characters"},
        "sampler": {"name": "plain", "max_new_tokens": 6},
        "run": {"steps": 3},
    }
    mixed = source(tmp_path / "m.jsonl", tiny_rows("demonstration"))
    for weight in (0.5, 1e-9):
        result = train_tiny(str(weight), data={"mix": {**mixed, "weight": weight}}, **sections)
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        nll[weight] = [line["mix/loss/nll"] for line in lines]
        for line in lines:
            parts = line["loss/policy"] + 0.2 * line["loss/value"] + weight * line["mix/loss/nll"]
            assert line["loss/total"] == pytest.approx(parts, abs=1e-6)
    assert asked == [*range(12), *range(12)]
    assert nll[0.5][-1] < min(nll[1e-9]) - 0.5


def test_a_reward_model_has_nothing_to_mix_in(train_tiny, tmp_path):
    mixed = source(tmp_path / "m.jsonl", tiny_rows("demonstration"))
    with pytest.raises(ConfigError, match="a reward model has no likelihood to mix in"):
        train_tiny(algorithm={"name": "reward_model"}, data={"mix": mixed})
