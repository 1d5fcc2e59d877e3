from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from prefopt.api import Completion, Rollout, RunInfo
from prefopt.builtin import progress

RUN = RunInfo(Path("runs/x"), "dpo", 0, 40)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def go_through(steps: int = 40) -> None:
    progress.prefopt_run_started(RUN)
    for step in range(1, steps + 1):
        progress.prefopt_step_finished(RUN, step, {"loss/total": 0.5, "lr": 1e-3, "gradient/norm": 1.0})
    progress.prefopt_step_finished(RUN, steps, {"eval/loss/total": 0.25, "eval/reward/accuracy": 0.75})
    progress.prefopt_run_finished(RUN, "finished")


def test_without_a_terminal_there_are_a_few_plain_lines(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    go_through()
    lines = out.getvalue().splitlines()
    assert lines[0] == "dpo: steps 0 to 40 in runs/x"
    assert lines[-1] == "dpo: finished"
    assert len(lines) == 20 + 3
    assert lines[1].startswith("step 2/40  loss/total 0.5  ")
    assert lines[1].endswith(" s left")
    assert lines[-2].startswith("step 40/40  eval/loss/total 0.25  eval/reward/accuracy 0.75")
    assert "\x1b" not in out.getvalue()


def test_in_a_terminal_there_is_one_live_line_with_the_time_left(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    go_through()
    assert "40/40" in out.getvalue()
    assert "eval/loss/total 0.25" in out.getvalue()
    assert out.getvalue().endswith("dpo: finished\n")


def test_steps_of_an_unknown_run_are_ignored(capsys):
    progress.prefopt_step_finished(RUN, 1, {"loss/total": 1.0})
    assert capsys.readouterr().err == ""


REPLIES = [
    Rollout(prompt="how\nmany?", completions=(Completion("three \x1b[31m", score=0.5), Completion("x", score=1.0)))
]


def draw_and_step() -> None:
    progress.prefopt_run_started(RUN)
    progress.prefopt_rollouts_drawn(RUN, 2, REPLIES)
    progress.prefopt_step_finished(RUN, 2, {"reward/mean": 0.75})
    progress.prefopt_run_finished(RUN, "finished")


def test_the_last_replies_are_shown_with_their_rewards(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    draw_and_step()
    lines = out.getvalue().splitlines()
    assert lines[1].startswith("step 2/40  reward/mean 0.75")
    assert lines[2] == "    0.5  how many? -> three  [31m"


def test_a_terminal_shows_them_as_a_table(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    draw_and_step()
    assert "reward" in out.getvalue()
    assert "how many?" in out.getvalue()
    assert "three" in out.getvalue()
    assert "three \x1b[31m" not in out.getvalue()


@pytest.fixture(autouse=True)
def _forget():
    yield
    progress._displays.clear()
