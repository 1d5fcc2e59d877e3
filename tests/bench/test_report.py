"""The report shows what it is given, and nothing in it can act."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser

import pytest

from prefopt.bench.plots import Axis, Point, forest, scatter
from prefopt.bench.report import (
    CellResult,
    Failure,
    Report,
    Sample,
    Summary,
    _side_by_side,
    _summary,
    build_report,
    commit_of,
    name_of,
    notes,
    printable,
    shown,
    table,
    to_html,
)
from prefopt.bench.suite import write_report
from prefopt.config.load import validated
from prefopt.config.models import SuiteConfig
from prefopt.config.yaml import parse
from prefopt.stats import Interval

PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script>alert(1)</script>",
    "<svg onload=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}",
    "\u202egnp.exe",
    "\x1b[31mred",
    "]]><iframe src=//evil>",
    "&lt;b&gt;",
]

SMALL = """\
prefopt: 1
name: small
seeds: [0, 1, 2]
baseline: sft
base: {{model: {{path: "{secret}"}}}}
methods: [{{label: DPO}}]
tasks: [{{name: length}}]
held_out: {{source: replies}}
"""


def test_where_there_is_no_gold_reward_the_table_has_what_there_is():
    whole = report()
    metrics = {"preference_accuracy": interval(0.6), "implicit_accuracy": interval(0.5)}
    told = whole.model_copy(update={"summary": [whole.summary[0].model_copy(update={"metrics": metrics})]})
    header, _, row, *_ = table(told)
    assert "preference accuracy" in header
    assert "gold reward" not in header
    assert "0.60 [0.50, 0.70]" in row
    assert "<th>preference accuracy</th>" in to_html(told)
    assert notes(told)[0].endswith("Student t]; the cost of `sft` itself is not counted.")


def test_what_judges_took_is_told_beside_tokens_and_summed_over_seeds():
    usage = ({"calls": 300.0, "cost": 0.5}, {"calls": 100.0}, {})
    cells = [
        cell.model_copy(update={"budget": cell.budget.model_copy(update={"usage": found})})
        for cell, found in zip(report().cells, usage, strict=True)
    ]
    told = report().model_copy(update={"cells": cells, "summary": [_summary(cells)]})
    assert (told.summary[0].budget["usage/calls"], told.summary[0].budget["usage/cost"]) == (400 / 3, 0.5 / 3)
    assert notes(told)[-1] == "DPO: judges and revisers report calls 133.333, cost 0.166667 per seed."
    assert told.comparable()["cells"] == report().comparable()["cells"]


def interval(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 0.1, high=mean + 0.1)


def report(label: str = "DPO", reply: str = "fine", seeds: int = 3) -> Report:
    budget = {
        "tokens_forward": 5,
        "tokens_backward": 10,
        "tokens_sampled": 0,
        "seconds": 1.5,
        "peak_memory_bytes": 10**8,
    }
    metrics = {"gold_reward": 1.5, "win_rate": 0.6, "kl_sequence": 0.9, "length": 20.0, "extra/part": 0.1}
    cells = [
        CellResult(
            algorithm="dpo",
            label=label,
            seed=s,
            settings={},
            metrics=metrics,
            budget=budget,
            versions={"prefopt": "0.1.0"},
            run="abc",
            samples=[{"prompt": reply, "reply": reply}],
        )
        for s in range(seeds)
    ]
    summary = Summary(
        algorithm="dpo",
        label=label,
        settings={"optim.lr": reply},
        n=seeds,
        metrics={name: interval(x) for name, x in metrics.items()},
        budget=budget,
    )
    configuration = {"baseline": "sft", "methods": [{"label": label, "best_of": 4}], "note": reply}
    return Report(
        suite="small",
        commit="abc",
        seeds=list(range(seeds)),
        configuration=configuration,
        summary=[summary],
        cells=cells,
        failures=[Failure(title=label, problem=reply)],
    )


class Page(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


HARMLESS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "pre", "ul", "li"}
HARMLESS |= {"table", "tr", "th", "td", "figure", "figcaption", "svg", "line", "text", "circle"}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_whatever_a_model_or_a_label_says_is_only_text(payload):
    page = Page(to_html(report(label=payload, reply=payload)))
    assert {tag for tag, _ in page.tags} <= HARMLESS
    attributes = {name for _, found in page.tags for name in found}
    assert not {a for a in attributes if a.startswith("on") or a in ("src", "href", "style", "srcdoc")}
    assert len(page.tags) == len(Page(to_html(report())).tags)


def test_the_page_needs_nothing_from_outside_and_says_so():
    text = to_html(report())
    assert "default-src 'none'" in text
    assert not re.findall(r"https?://|url\(|@import|<script|<link", text)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    from base64 import b64encode
    from hashlib import sha256

    assert f"sha256-{b64encode(sha256(style.encode()).digest()).decode()}" in text


def test_the_page_shows_table_plots_replies_costs_and_failures():
    text = to_html(report(reply="a reply that can be found"))
    for words in ("1.50 [1.40, 1.60]", "<svg", "extra/part", "100 MB", "What failed", "upper bound log n"):
        assert words in text
    assert text.count("a reply that can be found") >= 4


def test_hidden_characters_are_spelled_out():
    assert printable("a\u202eb\x1b[0m\nc\u200b") == "a\\u202eb\\u001b[0m\nc\\u200b"


def test_the_table_is_aligned_and_explains_itself():
    lines = table(report())
    assert lines[2].startswith("DPO (optim.lr=fine)  1.50 [1.40, 1.60]  0.60")
    assert lines[0].index("gold") == lines[2].index("1.50")
    assert "mean over 3 seeds" in lines[4]
    assert "single run" in table(report(seeds=1))[4]


def test_intervals_in_words():
    assert [shown(x) for x in (None, Interval(mean=1), interval(2))] == ["-", "1.00", "2.00 [1.90, 2.10]"]
    assert name_of(report().summary[0]) == "DPO (optim.lr=fine)"


def test_what_may_differ_between_runs_is_left_out_of_the_comparison():
    compared = report().comparable()
    assert "seconds" not in repr(compared)
    assert "peak_memory" not in repr(compared)
    assert compared["cells"][0]["budget"] == {"tokens_forward": 5, "tokens_backward": 10, "tokens_sampled": 0}


def test_axes_are_linear_with_round_ticks():
    axis = Axis.over([0.0, 10.0], 100, 200)
    assert axis(5.0) == 150.0
    assert axis(0.0) < axis(10.0)
    assert [text for _, text in axis.ticks()] == ["0", "2", "4", "6", "8", "10"]
    assert [text for _, text in Axis.over([0.3, 0.3], 0, 1).ticks()]


def test_plots_put_means_between_the_ends_of_their_intervals():
    points = [Point("a", interval(1.0), interval(0.5)), Point("b", Interval(mean=2.0), Interval(mean=3.0))]
    (a, b) = forest(points)["rows"]
    assert a["low"] < a["mean"] < a["high"] < b["mean"] == b["low"]
    (a, b) = scatter(points)["points"]
    assert a["left"] < a["x"] < a["right"] < b["x"]
    assert a["bottom"] > a["y"] > a["top"] > b["y"]  # pixels count downwards
    assert forest([])["rows"] == []
    assert scatter([Point("a", interval(1))])["points"] == []


def test_a_commit_is_that_of_a_repository_that_tracks_the_file(tmp_path):
    def git(*arguments: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *names, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    ours, installed = tmp_path / "ours.py", tmp_path / "venv/ours.py"
    installed.parent.mkdir()
    ours.write_text("1")
    installed.write_text("1")
    assert commit_of(ours) == ""
    git("init", "-q")
    git("add", "ours.py")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD").strip()
    assert (commit_of(ours), commit_of(installed)) == (head, "")
    ours.write_text("2")
    assert commit_of(ours) == head + "+"


def cell(seed: int, commit: str = "", **changes) -> CellResult:
    return report().cells[0].model_copy(update={"seed": seed, "commit": commit, **changes})


def built(plugins, *cells: CellResult) -> Report:
    suite = validated(SuiteConfig, parse(SMALL.format(secret="m"), "suite.yaml"), plugins.find)
    return build_report(suite, cells, [], "now")


def test_a_metric_that_some_seeds_lack_is_over_those_that_have_it(plugins):
    made = built(plugins, *(cell(s, metrics={"length": 1.0, **({"gold_reward": s} if s else {})}) for s in range(3)))
    (row,) = made.summary
    assert (row.n, row.metrics["length"].n) == (3, None)
    assert (row.metrics["gold_reward"].mean, row.metrics["gold_reward"].n) == (1.5, 2)
    assert table(made)[2].startswith("DPO     1.50 (n=2)")
    assert "1.50 (n=2)" in to_html(made)


def test_a_row_over_fewer_seeds_says_so(plugins):
    made = built(plugins, *(cell(s) for s in range(3)), *(cell(s, label="RM") for s in range(2)))
    lines = table(made)
    assert lines[2].startswith("DPO  ")
    assert lines[3].startswith("RM, 2 of 3 seeds  ")
    assert "mean over 3 seeds [95 % interval, Student t], over fewer where a row says so" in lines[-1]
    assert "mean over 2 seeds, too few" in table(report(seeds=2))[4]


def test_a_cell_keeps_the_commit_it_ran_at(plugins):
    made = built(plugins, cell(0, "old"), cell(1, "new"))
    assert (made.commit, [c.commit for c in made.cells]) == ("now", ["old", "new"])


def test_replies_of_every_setting_stand_side_by_side(plugins):
    settings = ({"optim.lr": 0.1}, {"optim.lr": 0.2})
    prompts = [Sample(prompt="same", reply="x"), Sample(prompt="same", reply="y")]
    made = built(plugins, *(cell(0, settings=s, samples=prompts) for s in settings))
    names = ["DPO (optim.lr=0.1)", "DPO (optim.lr=0.2)"]
    assert _side_by_side(made) == [("same", [(name, sample) for name in names]) for sample in prompts]


def test_a_traceback_is_shown_as_text():
    failure = Failure(title="train it", problem="ZeroDivisionError: x", traceback='File "<b>.py", line 1')
    text = to_html(report().model_copy(update={"failures": [failure]}))
    assert "<pre>File &#34;&lt;b&gt;.py&#34;, line 1</pre>" in text


SECRET = "hf_" + "abcdefgh" * 3


def test_no_secret_is_in_a_report(plugins, tmp_path, monkeypatch):
    monkeypatch.setenv("MADE_UP_PASSWORD", "open sesame")
    made = report(label=SECRET, reply="open sesame")
    suite = validated(SuiteConfig, parse(SMALL.format(secret=SECRET), "suite.yaml"), plugins.find)
    write_report(build_report(suite, made.cells, made.failures, ""), tmp_path)
    for name in ("report.json", "report.html"):
        text = (tmp_path / name).read_text("utf-8")
        assert SECRET not in text
        assert "open sesame" not in text
        assert text.count("[redacted]") > 5
