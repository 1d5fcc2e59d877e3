"""What a worker process answers, and what it counts."""

from __future__ import annotations

import json
import math

import pytest
import torch

from prefopt.api import Completion, Rollout, Score, Task
from prefopt.bench import cells
from prefopt.bench.cells import Measurement, _Bench, _device, _winners, measure, work
from prefopt.config.load import validated
from prefopt.config.yaml import Document
from prefopt.errors import DataError, ResourceError

REQUEST = {
    "seed": 0,
    "policy": None,
    "baseline": "nowhere",
    "best_of": 3,
    "tasks": [{"name": "length"}],
    "sampler": None,
    "prompts": 4,
    "held_out": {"source": "replies", "size": 4},
}


@pytest.fixture
def measurement(plugins) -> Measurement:
    return validated(Measurement, Document(REQUEST), plugins.find)


class Letters:
    """A reward model that likes long replies, and reads one token for each letter."""

    tokens = 0

    def __call__(self, groups):
        self.tokens += sum(len(c.text) for group in groups for c in group.completions)
        return [[Score(float(len(c.text))) for c in group.completions] for group in groups]


def replies(n: int) -> list[Rollout]:
    """Replies of 1, 2, ... n tokens to one prompt."""
    return [Rollout(prompt="p", completions=tuple(Completion("a" * k, ids=(1,) * k) for k in range(1, n + 1)))]


def test_what_nobody_foresaw_is_an_answer_with_its_traceback(plugins, monkeypatch):
    monkeypatch.setattr(cells, "_plugins", plugins)
    monkeypatch.setattr(cells, "_stage", lambda config, plugins: {"outcome": 1 / 0})
    answer = json.loads(work(json.dumps({"stage": {}})))
    assert answer["error"] == ["ZeroDivisionError: division by zero"]
    assert "test_cells.py" in answer["traceback"]


def test_what_is_foreseen_has_no_traceback(plugins, monkeypatch):
    def fail(config, plugins):
        raise DataError("no rows", "and no columns", where="data")

    monkeypatch.setattr(cells, "_plugins", plugins)
    monkeypatch.setattr(cells, "_stage", fail)
    assert json.loads(work(json.dumps({"stage": {}}))) == {"error": ["data: no rows", "data: and no columns"]}


@pytest.mark.parametrize("asked", [(1, 2), (2,), (2, 1, 2)])
def test_answering_costs_the_replies_drawn_and_not_given_in_any_order_of_tasks(plugins, measurement, asked):
    bench = _Bench(measurement, plugins)
    best = bench._best_of(replies, Letters(), 3, torch.device("cpu"))
    kept = 0
    for count in asked:  # like `Measured`, which asks again only for more
        if count > kept:
            found, kept = best(count), count
    assert [c.text for c in found[0].completions] == ["aaa", "aaaaaa"]
    assert (bench.answering.sampled, bench.answering.scored) == (1 + 2 + 4 + 5, 21)
    assert bench.answering.seconds > 0
    assert bench.answering.peak_memory_bytes > 1e7


def test_a_reply_without_a_score_never_wins():
    drawn = replies(4)[0]
    assert [c.text for c in _winners(drawn, [None, -5.0, 1.0, None], 2).completions] == ["aa", "aaa"]


class Odd(Task):
    """Numbers that are none."""

    name = "odd"

    def evaluate(self, subject):
        return {"fine": 1, "odd": math.nan, "huge": math.inf}


def test_what_is_no_finite_number_is_left_out(plugins, measurement, monkeypatch):
    monkeypatch.setattr(_Bench, "subject", lambda self: None)
    monkeypatch.setattr(cells, "_samples", lambda subject, tasks: [])
    found = measure(measurement.model_copy(update={"tasks": (Odd(),)}), plugins)
    assert found["metrics"] == {"fine": 1.0}


def test_the_device_is_the_one_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [_device(name).type for name in ("cpu", "auto", "cuda")] == ["cpu", "cuda", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [_device(name).type for name in ("cpu", "auto")] == ["cpu", "cpu"]
    with pytest.raises(ResourceError, match="no CUDA device"):
        _device("cuda")
