"""Stages that make rows: what is in them and where it comes from, what they cost, and how they go on when stopped."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_1samp

from prefopt.api import ConfigError, DataError, Prompt, ServiceError
from prefopt.config.stages import stage_from
from prefopt.config.yaml import Document
from prefopt.data.render import Renderer, load_tokenizer
from prefopt.data.streams import generator
from prefopt.engine.models import open_model
from prefopt.engine.rollout import draw
from prefopt.making.labels import Item
from prefopt.making.stage import make
from prefopt.pipeline import checked, run_stages
from prefopt.plugins import load
from prefopt.rows import Comparison, Completion, Demonstration, Rollout
from prefopt.verdicts import Verdict

OWN = '''
"""A reviser, a judge and a reward that somebody else wrote, about exclamation marks."""
from pathlib import Path
from prefopt.api import Judge, Reviser, Revision, RewardSource, Score, Verdict, hookimpl

class Shouter(Reviser):
    """Adds an exclamation mark; has nothing to say about some principle."""
    name = "shouter"
    silent: str = ""

    def revise(self, drafts):
        return [self._one(draft) for draft in drafts]

    def _one(self, draft):
        if draft.principle.id == self.silent:
            return Revision(None, "unused", "not my business")
        return Revision(f"not loud: {draft.principle.critique}", draft.reply + "!", usage={"calls": 1.0})

class Loud(RewardSource):
    """Exclamation marks."""
    name = "loud"

    def score(self, groups):
        return [[Score(float(c.text.count("!"))) for c in group.completions] for group in groups]

class Longer(Judge):
    """The longer reply, whatever the principle; it stops once, in the middle."""
    name = "longer_once"

    @property
    def reads_principles(self):
        return True

    def compare(self, pairs):
        asked = Path("asked.txt")
        asked.write_text((asked.read_text() if asked.exists() else "") + "x" * len(pairs))
        if Path("stop").exists() and len(asked.read_text()) > 12:
            raise KeyboardInterrupt
        return [self._one(len(p.a.text) - len(p.b.text)) for p in pairs]

    def _one(self, gap):
        return Verdict(float(gap > 0), tie=float(gap == 0), usage={"calls": 1.0})

@hookimpl
def prefopt_revisers():
    return [Shouter]

@hookimpl
def prefopt_rewards():
    return [Loud]

@hookimpl
def prefopt_judges():
    return [Longer]
'''
IDS = ("one", "two", "three")
PROMPTS = [f"count from {i}: " for i in range(12)]


@pytest.fixture
def folder(tmp_path, install_plugin, monkeypatch):
    """A folder with those components, prompts and a constitution."""
    install_plugin(tmp_path, "loud", OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "place": i}) + "\n" for i, p in enumerate(PROMPTS))
    )
    told = [
        f"  - {{id: {name}, critique: is it {name}?, revise: make it {name}, compare: more {name}}}" for name in IDS
    ]
    Path("constitution.yaml").write_text("\n".join(["principles:", *told]))
    return tmp_path


@pytest.fixture
def stage(folder, tiny_model):
    """A function that makes the rows of a stage: what it says of itself, the rows, and its result."""

    def run(kind, name="rows", **sections):
        told = {"prefopt": 1, "kind": kind, "model": {"path": str(tiny_model)}, "sampler": sampler(), **sections}
        told = {"data": {"source": "jsonl", "path": "prompts.jsonl"}, "run": {"dir": name, "device": "cpu"}, **told}
        plugins = load()
        made = make(stage_from(Document(told), plugins.find), plugins)
        return made, read(made.path), json.loads((made.path.parent / "result.json").read_text())

    return run


def sampler():
    return {"name": "plain", "max_new_tokens": 6}


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def drawn(tiny_model, n):
    """The same replies without a stage."""
    model = open_model(str(tiny_model), torch.device("cpu"))
    renderer = Renderer(load_tokenizer(str(tiny_model)), model.positions)
    rows = [Prompt(prompt=prompt, index=i) for i, prompt in enumerate(PROMPTS)]
    return draw(load().find("sampler", "plain")(max_new_tokens=6).open(model), renderer, rows, n, 0, "stage")


def test_replies_are_drawn_and_their_tokens_counted(stage, tiny_model):
    _, rows, result = stage("sample", n=3)
    groups = drawn(tiny_model, 3)
    assert [row["completions"] for row in rows] == [[c.text for c in group.completions] for group in groups]
    assert [(row["place"], row["ranks"]) for row in rows] == [(i, [0, 0, 0]) for i in range(12)]
    tokens = sum(len(c.ids) for group in groups for c in group.completions)
    assert result["budget"] == {"backward": 0, "forward": 0, "sampled": tokens}
    _, single, _ = stage("sample", name="one", n=1, batch=5)
    assert [row["completion"] for row in single] == [group.completions[0].text for group in groups]


def test_self_play_sets_a_draw_against_the_row_s_own_reply(stage, tiny_model):
    replies = [c.text for group in drawn(tiny_model, 1) for c in group.completions]
    own = [reply if i == 3 else f"own {i}" for i, reply in enumerate(replies)]
    given = [{"prompt": PROMPTS[i], "completion": own[i], "topic": i} for i in range(len(PROMPTS))]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    made, rows, _ = stage("sample", data={"source": "jsonl", "path": "own.jsonl"}, self_play=True)
    told = [(row["prompt"], row["chosen"], row["rejected"], row["topic"]) for row in rows]
    kept = [i for i in range(len(PROMPTS)) if i != 3]
    assert told == [(PROMPTS[i], own[i], replies[i], i) for i in kept]
    assert dict(made.missing) == {"all replies are the same": 1}
    assert type(load().find("data source", "jsonl")(path=str(made.path)).rows()[0]) is Comparison


def test_self_play_needs_demonstrations_and_one_draw(stage):
    with pytest.raises(DataError, match="a prompt cannot become a demonstration"):
        stage("sample", self_play=True)
    with pytest.raises(ConfigError, match="leave `n` out"):
        stage("sample", self_play=True, n=2)


def test_a_judge_labels_drawn_pairs(stage, tiny_model):
    made, rows, result = stage("label", n=2, judge={"name": "rule", "prefer": "longer", "confidence": 0.8})
    pairs = [[c.text for c in group.completions] for group in drawn(tiny_model, 2)]
    assert [sorted((row["chosen"], row["rejected"])) for row in rows] == [sorted(p) for p in pairs if p[0] != p[1]]
    for row in rows:
        longer = len(row["chosen"]) > len(row["rejected"])
        assert row["preference"] == (pytest.approx(0.8) if longer else 0.5)
    source = load().find("data source", "jsonl")(path=str(made.path))
    assert [row.preference for row in source.rows()] == [row["preference"] for row in rows]
    assert result["rows"] == made.rows == len(rows)


def test_rows_with_replies_of_their_own_are_labelled_as_they_are(stage):
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "bbb"}) + "\n")
    data = {"source": "jsonl", "path": "pairs.jsonl"}
    _, rows, result = stage("label", data=data, model=None, judge={"name": "rule", "prefer": "longer"})
    assert [(row["chosen"], row["votes"]) for row in rows] == [("bbb", [2, 0, 0])]
    assert result["budget"]["sampled"] == 0


def test_rows_of_a_stage_say_by_whom_they_were_made_and_not_what_they_were_made_of(stage):
    made, first, _ = stage("sample", n=1)
    _, second, _ = stage("sample", name="again", n=1, batch=5, data={"source": "jsonl", "path": str(made.path)})
    assert {row["drawn"]["by"] for row in first}.isdisjoint({row["drawn"]["by"] for row in second})


def test_rows_of_several_replies_have_one_form_though_two_of_them_are_the_same():
    two = Rollout(prompt="p", completions=(Completion("a"), Completion("b")))
    (met,) = Item.of(two, "all", ranked=True).met
    told = Item(two, two.completions, (met,), ranked=True).record([Verdict(1.0)])
    assert (told["completions"], told["scores"]) == (["a", "b"], [1.0, 0.0])
    assert "chosen" in Item.of(two, "all").record([Verdict(1.0)])


def test_a_stage_that_was_killed_repeats_only_the_batch_in_flight(stage, folder):
    settings = {"n": 2, "judge": {"name": "longer_once"}, "batch": 4}
    _, whole, result = stage("label", name="whole", **settings)
    Path("asked.txt").unlink()
    Path("stop").touch()
    with pytest.raises(KeyboardInterrupt):
        stage("label", name="killed", **settings)
    before = read("killed/rows.jsonl")
    asked = len(Path("asked.txt").read_text())
    assert 0 < len(before) < len(whole)
    Path("stop").unlink()
    with Path("killed/rows.jsonl").open("a") as file:
        file.write('{"prompt": "torn')
    with Path("killed/work.jsonl").open("a") as file:
        file.write('{"sampled": 3, "torn')
    _, rows, again = stage("label", name="killed", **settings)
    assert Path("killed/rows.jsonl").read_bytes() == Path("whole/rows.jsonl").read_bytes()
    assert len(Path("asked.txt").read_text()) - asked == 2 * (len(rows) - len(before))
    assert again == result


def test_a_reviser_in_one_file_revises_by_drawn_principles_and_leaves_its_trace(stage, tiny_model):
    made, rows, result = stage(
        "revise", constitution="constitution.yaml", reviser={"name": "shouter"}, rounds=4, measure={"name": "loud"}
    )
    drafts = [group.completions[0].text for group in drawn(tiny_model, 1)]
    for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
        assert (row["draft"], row["completion"], row["place"]) == (draft, draft + "!!!!", i)
        assert [one["revision"] for one in row["trace"]] == [draft + "!" * k for k in (1, 2, 3, 4)]
        order = [IDS[k] for k in generator(0, "component", "principles", i).permutation(3)]
        assert [one["principle"] for one in row["trace"]] == [*order, order[0]]
        assert row["trace"][0]["critique"] == f"not loud: is it {order[0]}?"
    assert result["usage"] == {"calls": 4.0 * len(rows)}
    loud = [float(draft.count("!")) for draft in drafts]
    assert result["gain"]["gain"] == {"mean": 4.0, "low": 4.0, "high": 4.0, "n": None}
    if len(set(loud)) > 1:
        expected = ttest_1samp(loud, 0).confidence_interval(0.95)
        assert [result["gain"]["drafts"][k] for k in ("low", "high")] == pytest.approx([expected.low, expected.high])
    assert any("gain 4 (4 to 4)" in line for line in made.lines)


def test_a_missing_revision_is_no_row_and_too_many_are_a_failure(stage):
    settings = {"constitution": "constitution.yaml", "reviser": {"name": "shouter", "silent": "two"}}
    with pytest.raises(ServiceError, match=r"of 12 rows have no result\. \d+ times: not my business") as raised:
        stage("revise", **settings)
    assert raised.value.exit_code == 6
    made, rows, _ = stage("revise", name="allowed", max_missing=0.9, **settings)
    first = [IDS[generator(0, "component", "principles", i).permutation(3)[0]] for i in range(12)]
    assert [row["place"] for row in rows] == [i for i, name in enumerate(first) if name != "two"]
    assert made.missing == {"not my business": first.count("two")}


def test_labels_by_principles_say_which_was_drawn(stage):
    _, rows, _ = stage("label", n=2, constitution="constitution.yaml", judge={"name": "longer_once"})
    for row in rows:
        name = IDS[int(generator(0, "component", "principle", row["place"]).integers(3))]
        assert row["principle"] == {"id": name, "compare": f"more {name}"}


def test_a_judge_that_reads_no_principle_is_refused_where_there_is_a_constitution(stage):
    with pytest.raises(ConfigError, match="judge: judge `rule` does not read principles"):
        stage("label", n=2, constitution="constitution.yaml", judge={"name": "rule", "prefer": "longer"})


def test_rows_keep_weight_and_columns_but_not_those_of_another_format(stage):
    told = {"prompt": "p: ", "weight": 2.5, "chosen": "a", "rejected": "b", "source": "here"}
    Path("pairs.jsonl").write_text(json.dumps(told) + "\n")
    data = {"source": "jsonl", "path": "pairs.jsonl", "format": "prompt"}
    made, rows, result = stage("sample", data=data)
    assert (rows[0]["weight"], rows[0]["source"]) == (2.5, "here")
    (row,) = load().find("data source", "jsonl")(path=str(made.path)).rows()
    assert (type(row), row.weight, row.completion.text) == (Demonstration, 2.5, rows[0]["completion"])
    assert result["cut"] == made.cut == 1  # six tokens are too few
    assert "1 of the texts drawn were cut" in made.lines[0]


def test_what_belonged_to_other_replies_is_not_kept_and_what_is_a_user_s_is(stage):
    row = {"prompt": "p", "completion": "good", "preference": 0.2, "margin": 3, "raters": ["a"], "draft": "mine"}
    Path("own.jsonl").write_text(json.dumps(row) + "\n")
    made, (told,), _ = stage("sample", data={"source": "jsonl", "path": "own.jsonl"}, self_play=True)
    assert told.keys() == {"prompt", "chosen", "rejected", "draft", "drawn"}
    (row,) = load().find("data source", "jsonl")(path=str(made.path)).rows()
    assert (row.chosen.text, row.preference, row.margin) == ("good", 1.0, None)


def test_two_replies_keep_what_the_judge_said_of_them_and_more_are_ranked(stage):
    judge = {"name": "rule", "prefer": "longer", "confidence": 0.8}
    two = {"prompt": "p", "completions": ["a", "bb"], "ranks": [0, 0]}
    three = {"prompt": "q", "completions": ["a", "bb", "ccc"], "ranks": [0, 0, 0]}
    for name, rows in (("two", [two, two]), ("three", [two, three])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "jsonl", "path": "two.jsonl"}
    _, rows, _ = stage("label", name="a", data=data, model=None, judge=judge)
    assert [(row["chosen"], row["preference"]) for row in rows] == [("bb", pytest.approx(0.8))] * 2
    data = {"source": "jsonl", "path": "three.jsonl"}
    _, rows, _ = stage("label", name="b", data=data, model=None, judge=judge)
    assert [row["scores"] for row in rows] == [pytest.approx([0.2, 0.8]), pytest.approx([0.2, 0.5, 0.8])]


def test_how_many_may_be_missing_is_not_what_rows_are_made_by(stage):
    settings = {"constitution": "constitution.yaml", "reviser": {"name": "shouter", "silent": "two"}}
    with pytest.raises(ServiceError):
        stage("revise", **settings)
    made, rows, _ = stage("revise", **settings, max_missing=1.0, batch=3)
    assert made.rows == len(rows) > 0


def test_a_sampler_runs_as_long_as_the_stage(stage, monkeypatch):
    events = []

    @contextmanager
    def running(self, services):
        events.append(services.kept("x").name)
        yield self
        events.append("ended")

    monkeypatch.setattr(load().find("sampler", "plain"), "running", running)
    stage("sample")
    assert events == ["x", "ended"]


def test_recorded_verdicts_that_have_changed_since_are_not_gone_on_with(folder):
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "bbb"}) + "\n")
    verdict = {"prompt": "p", "a": "a", "b": "bbb", "verdict": "a"}
    Path("verdicts.jsonl").write_text(json.dumps(verdict) + "\n")
    judge = {"name": "replay", "path": "verdicts.jsonl"}
    one = {"name": "rows", "kind": "label", "data": {"source": "jsonl", "path": "pairs.jsonl"}, "judge": judge}
    document = Document({"prefopt": 1, "stages": [one], "run": {"dir": "all"}})
    plugins = load()
    list(run_stages(checked(document, plugins), plugins))
    assert checked(document, plugins)
    Path("verdicts.jsonl").write_text(json.dumps({**verdict, "verdict": "b"}) + "\n")
    with pytest.raises(ConfigError, match=r"verdicts.jsonl: stage `rows` was begun when this file"):
        checked(document, plugins)


def test_a_constitution_that_has_changed_since_is_not_gone_on_with(folder, tiny_model):
    one = {"name": "rows", "kind": "revise", "constitution": "constitution.yaml", "reviser": {"name": "shouter"}}
    told = {"prefopt": 1, "model": {"path": str(tiny_model)}, "sampler": sampler(), "stages": [one]}
    document = Document({**told, "data": {"source": "jsonl", "path": "prompts.jsonl"}, "run": {"dir": "all"}})
    plugins = load()
    list(run_stages(checked(document, plugins), plugins))
    assert checked(document, plugins)
    Path("constitution.yaml").write_text(Path("constitution.yaml").read_text().replace("is it two", "is it too"))
    with pytest.raises(ConfigError, match=r"constitution.yaml: stage `rows` was begun when this file"):
        checked(document, plugins)
