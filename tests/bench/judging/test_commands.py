"""`prefopt judge`: labels that can be resumed, evaluations, comparisons, and a third party's judge in one file."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from prefopt.api import PrefoptError, ServiceError
from prefopt.bench.judging.evaluate import evaluate
from prefopt.bench.judging.label import label
from prefopt.cli.app import app
from prefopt.config.judging import JudgingConfig
from prefopt.config.load import validated
from prefopt.config.yaml import Document

OWN = '''
"""A judge that somebody else wrote: it counts vowels."""
from prefopt.api import Judge, Score, Verdict, hookimpl

def vowels(completion):
    return sum(completion.text.count(c) for c in "aeiou")

class Vowels(Judge):
    """Prefers vowels; nothing is said about texts with a question mark."""
    name = "vowels"

    def compare(self, pairs):
        with open("asked.txt", "a") as file:
            file.write("x" * len(pairs))
        return [self._verdict(p) for p in pairs]

    def _verdict(self, pair):
        if "?" in pair.a.text + pair.b.text:
            return Verdict(None, reason="it is a question")
        gap = vowels(pair.a) - vowels(pair.b)
        return Verdict(float(gap > 0), tie=float(gap == 0), usage={"calls": 1.0})

    def rate(self, groups):
        return [[Score(float(vowels(c))) for c in group.completions] for group in groups]

@hookimpl
def prefopt_judges():
    return [Vowels]
'''
PAIRS = [
    {"prompt": "one", "chosen": "aaa", "rejected": "b", "source": "x"},
    {"prompt": "two", "chosen": "b", "rejected": "aaa"},
    {"prompt": "three", "chosen": "ab", "rejected": "ac"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, install_plugin, monkeypatch):
    """A folder in which that judge is installed."""
    install_plugin(tmp_path, "vowels", OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(folder, **sections):
    from prefopt.plugins import load

    told = {"prefopt": 1, "out": str(folder / "out"), "judge": {"name": "vowels"}, **sections}
    return validated(JudgingConfig, Document(told), load().find)


def asked(folder):
    path = folder / "asked.txt"
    return len(path.read_text()) if path.exists() else 0


def test_a_judge_in_one_file_labels_pairs(folder):
    data = {"source": "jsonl", "path": write(folder / "pairs.jsonl", PAIRS)}
    lines = []
    result = label(configured(folder, data=data), lines.append)
    assert (result.labelled, result.missing) == (3, {})
    assert lines[0] == "3 rows, 0 labelled before, 6 questions to ask"
    one, two, three = read(result.path)
    assert (one["chosen"], one["preference"], one["votes"], one["source"]) == ("aaa", 1.0, [2, 0, 0], "x")
    assert (two["chosen"], two["preference"]) == ("aaa", 1.0)
    assert (three["preference"], three["votes"], three["judged"]["tie"]) == (0.5, [0, 0, 2], 1.0)
    assert one["judged"]["usage"] == {"calls": 2.0}
    assert asked(folder) == 6


def test_labels_are_rows_that_methods_read(folder, plugins):
    data = {"source": "jsonl", "path": write(folder / "pairs.jsonl", PAIRS)}
    result = label(configured(folder, data=data), lambda line: None)
    rows = plugins.find("data source", "jsonl")(path=str(result.path)).rows()
    assert [(row.chosen.text, row.preference, row.votes) for row in rows][:2] == [("aaa", 1.0, (2, 0, 0))] * 2
    assert rows[0].extra["judged"]["key"]


def test_candidates_get_win_rates(folder):
    rows = [{"prompt": "p", "completions": ["b", "a", "aa"], "ranks": [0, 1, 2]}]
    data = {"source": "jsonl", "path": write(folder / "many.jsonl", rows)}
    (one,) = read(label(configured(folder, data=data), lambda line: None).path)
    assert (one["completions"], one["scores"]) == (["b", "a", "aa"], [0.0, 0.5, 1.0])
    assert [v["places"] for v in one["judged"]["verdicts"]] == [[0, 1], [0, 2], [1, 2]]
    ring = configured(folder, data=data, pairing="ring", out=str(folder / "ring"))
    assert len(read(label(ring, lambda line: None).path)[0]["judged"]["verdicts"]) == 3


def test_what_is_labelled_is_not_asked_again_and_a_torn_line_is(folder):
    data = {"source": "jsonl", "path": write(folder / "pairs.jsonl", PAIRS)}
    config = configured(folder, data=data)
    path = label(config, lambda line: None).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    lines = []
    label(config, lines.append)
    assert path.read_bytes() == whole
    assert asked(folder) == 6 + 2
    assert lines[0] == "3 rows, 2 labelled before, 2 questions to ask"


def test_rows_without_a_verdict_are_not_written_and_too_many_are_a_failure(folder):
    rows = [*PAIRS, {"prompt": "four", "chosen": "why?", "rejected": "no"}]
    data = {"source": "jsonl", "path": write(folder / "pairs.jsonl", rows)}
    with pytest.raises(ServiceError, match="1 of 4 rows have no verdict. 1 times: it is a question") as raised:
        label(configured(folder, data=data), lambda line: None)
    assert raised.value.exit_code == 6
    assert len(read(folder / "out" / "labels.jsonl")) == 3
    result = label(configured(folder, data=data, max_missing=0.3), lambda line: None)
    assert (result.labelled, result.missing) == (3, {"it is a question": 1})


def test_labels_of_another_judge_are_not_mixed_in(folder):
    data = {"source": "jsonl", "path": write(folder / "pairs.jsonl", PAIRS)}
    label(configured(folder, data=data), lambda line: None)
    other = configured(folder, data=data, judge={"name": "rule", "prefer": "longer"})
    with pytest.raises(PrefoptError, match="by another judge"):
        label(other, lambda line: None)


def test_the_same_judge_is_a_reward_and_a_win_rate(folder):
    from prefopt.api import Completion, Rollout
    from prefopt.bench.tasks import WinRate
    from prefopt.builtin.rewards import JudgeReward
    from prefopt.engine.services import EngineServices

    judge = configured(folder, data={"source": "replies"}).judge
    group = Rollout(prompt="p", completions=(Completion("a"), Completion("aa"), Completion("b")))
    scores = JudgeReward(judge=judge).open(EngineServices(0))([group])
    assert [s.value for s in scores[0]] == [0.5, 1.0, 0.0]
    rated = JudgeReward(judge=judge, by="rating").open(EngineServices(0))([group])
    assert [s.value for s in rated[0]] == [1.0, 2.0, 0.0]

    class Drawn:
        def rollouts(self, n):
            return [Rollout(prompt="p", completions=(Completion("aa"),))]

        def baseline(self, n):
            return [Rollout(prompt="p", completions=(Completion("a"),))]

        def judge(self, judge):
            return judge.compare

    assert WinRate(judge=judge).evaluate(Drawn()) == {"win_rate": 1.0}


def command(folder, name, **sections):
    from prefopt.config.yaml import dump

    (folder / "judging.yaml").write_text(dump({"prefopt": 1, "out": str(folder / "out"), **sections}))
    return CliRunner().invoke(app, ["judge", name, str(folder / "judging.yaml")], catch_exceptions=False)


def test_label_says_where_the_rows_are_and_how_often_a_canary_worked(folder):
    data = {"source": "jsonl", "path": write(folder / "pairs.jsonl", PAIRS)}
    done = command(folder, "label", data=data, judge={"name": "vowels"})
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == f"3 rows in {folder}/out/labels.jsonl"
    from prefopt.testing.tiny import build_tiny

    build_tiny(folder / "model", max_position_embeddings=2048)
    local = {"name": "local", "path": str(folder / "model"), "canaries": 2}
    done = command(folder, "label", data=data, judge=local, out=str(folder / "local"))
    assert done.exit_code == 0
    assert "of 2 fooled the judge" in done.output


def test_evaluate_prints_a_table_and_writes_a_page(folder):
    data = {"source": "jsonl", "path": write(folder / "pairs.jsonl", PAIRS[:2] * 3)}
    judges = {"vowels": {"name": "vowels"}, "longer": {"name": "rule", "prefer": "longer"}}
    done = command(folder, "evaluate", data=data, judges=judges)
    assert done.exit_code == 0
    assert "judge   accuracy" in done.output
    report = json.loads((folder / "out/report.json").read_text())
    assert [j["label"] for j in report["judges"]] == ["vowels", "longer"]
    assert report["judges"][0]["metrics"]["accuracy"]["mean"] == 0.5
    page = (folder / "out/report.html").read_text()
    assert "Content-Security-Policy" in page
    assert "<script" not in page


def test_the_page_escapes_what_judges_say(folder):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    records = [{"prompt": "p", "a": "a", "b": "b", "verdict": "<script>alert(1)</script>"}]
    judge = {"name": "replay", "path": write(folder / "said.jsonl", records)}
    data = {"source": "jsonl", "path": write(folder / "pairs.jsonl", rows)}
    assert command(folder, "evaluate", data=data, judge=judge).exit_code == 0
    assert "<script" not in (folder / "out/report.html").read_text()


def test_compare_ranks_systems(folder):
    def system(name, text):
        rows = [{"prompt": f"p{i}", "completion": text.format(i)} for i in range(12)]
        return {"source": "jsonl", "path": write(folder / f"{name}.jsonl", rows)}

    systems = {"weak": system("weak", "b{}"), "strong": system("strong", "aaa{}"), "middle": system("middle", "a{}")}
    done = command(folder, "compare", judge={"name": "vowels"}, systems=systems)
    assert done.exit_code == 0
    report = json.loads((folder / "out/report.json").read_text())
    assert list(report["ranking"]) == ["strong", "middle", "weak"]
    wins = {(m["system"], m["against"]): m["win_rate"]["mean"] for m in report["matches"]}
    assert wins == {("weak", "strong"): 0.0, ("weak", "middle"): 0.0, ("strong", "middle"): 1.0}
    against = command(folder, "compare", judge={"name": "vowels"}, systems=systems, baseline="weak")
    assert against.exit_code == 0
    report = json.loads((folder / "out/report.json").read_text())
    assert [(m["system"], m["against"]) for m in report["matches"]] == [("strong", "weak"), ("middle", "weak")]


def test_a_configuration_says_who_judges(folder):
    for sections in ({"judges": {}, "judge": None}, {"judges": {"v": {"name": "vowels"}}}):
        with pytest.raises(PrefoptError, match="either `judge` or `judges`"):
            configured(folder, **sections)
    with pytest.raises(PrefoptError, match="none of the systems"):
        configured(folder, baseline="x")
    data = {"source": "jsonl", "path": write(folder / "prompts.jsonl", [{"prompt": "p"}])}
    with pytest.raises(PrefoptError, match="a prompt cannot become a comparison"):
        evaluate(configured(folder, data=data), lambda line: None)
    with pytest.raises(PrefoptError, match="without two replies cannot be compared"):
        label(configured(folder, data=data), lambda line: None)
