"""A user's function in a child process: what it may do, and that nothing it does costs more than its own scores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
from prefopt_rewards.function import FunctionReward

from prefopt.api import Completion, ConfigError, Message, Rollout

BAD = Path(__file__).with_name("bad_rewards.py")
DEADLINE = 1.0


def reward(name, **settings):
    settings = {"deadline": DEADLINE, "memory_mb": 512, **settings}
    return FunctionReward(function=f"{BAD}:{name}", **settings).open(None)


def group(*texts, index=0, prompt="p", **extra):
    return Rollout(prompt=prompt, index=index, completions=tuple(Completion(t) for t in texts), extra=extra)


def values(scores):
    return [[score.value for score in own] for own in scores]


BEFORE, WRONG, AFTER = group("abcd", index=6), group("abc", "bad", index=7), group("ab", index=8)

WHOLE = {
    "raises": "ValueError: no such thing (bad_rewards.py:",
    "raises_unspeakably": "Unspeakable (bad_rewards.py:",
    "is_too_short": "it gave a list of 1 instead of a list of 2 numbers",
    "is_one_value": "it gave a float instead of a list of 2 numbers",
    "is_text": "it gave a str instead of a number",
    "holds_text": "it gave a str instead of a number",
    "is_nothing": "it gave a NoneType instead of a list of 2 numbers",
    "is_a_set": "it gave a set instead of a number",
    "is_huge": "it gave a list of 1048576, more than there are completions",
    "segfaults": "its process was killed by SIGSEGV",
    "exits": "its process ended by itself, with exit code 3",
    "exits_politely": "SystemExit: 3",
    "allocates": "MemoryError",
    "recurses": "RecursionError",
    "leaves_a_child": "its process ended by itself, with exit code 3",
    "closes_everything": "its process ended by itself, with exit code 1",
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_a_bad_function_does_costs_its_own_group_only(name):
    patient = 10 * DEADLINE  # filling memory takes its time on a busy machine
    score = reward(name, deadline=patient)
    for _ in range(2):
        began = time.monotonic()
        before, wrong, after = score([BEFORE, WRONG, AFTER])
        assert time.monotonic() - began < patient + 2
        assert values([before, after]) == [[1.0], [0.5]]
        assert [s.value for s in wrong] == [None, None]
        for sample, found in enumerate(wrong):
            assert found.reason.startswith(f"function bad_rewards.py:{name}, row 7, sample {sample}: {WHOLE[name]}")


@pytest.mark.parametrize(("name", "sample"), [("is_not_a_number", 0), ("is_infinite", 1)])
def test_what_is_not_finite_costs_its_own_sample_only(name, sample):
    ((*found,),) = reward(name)([WRONG])
    assert [found[sample].value, found[1 - sample].value] == [None, 1.0]
    assert f"row 7, sample {sample}: its score is " in found[sample].reason
    assert found[sample].reason.endswith("which is not finite")


@pytest.mark.parametrize("name", ["hangs", "hangs_in_c", "prints_without_end"])
def test_what_takes_too_long_is_killed_and_the_next_step_is_scored(name, capfd):
    score = reward(name)
    began = time.monotonic()
    before, wrong, after = score([BEFORE, WRONG, AFTER])
    assert DEADLINE <= time.monotonic() - began < DEADLINE + 2
    assert values([before, wrong, after]) == [[1.0], [None, None], [None]]
    assert "row 7, sample 1: it took longer than the deadline and was killed" in wrong[1].reason
    assert "row 8, sample 0: the deadline of 1 s had passed before its turn" in after[0].reason
    assert values(score([BEFORE, AFTER])) == [[1.0], [0.5]]
    assert len(capfd.readouterr().err) < 2**17


def test_with_two_workers_a_completion_that_hangs_does_not_keep_the_others_waiting():
    score = reward("hangs", workers=2)
    assert values(score([BEFORE, WRONG, AFTER])) == [[1.0], [None, None], [0.5]]


def test_nothing_is_left_of_what_was_killed():
    score = reward("leaves_a_child")
    score([WRONG])
    listed = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    assert [line for line in listed.splitlines() if line.split(None, 1)[1] == "sleep 73.25"] == []


def test_processes_end_with_their_owner():
    code = f"""
import os
from prefopt_rewards.function import FunctionReward, Pool
source = FunctionReward(function={str(BAD) + ":good"!r})
score = source.open(None)
print(score.__self__._idle.get()._running.pid, flush=True)
os._exit(1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    until = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        os.sched_yield()
    assert not os.path.exists(f"/proc/{pid}")


def test_a_function_gets_copies_and_its_prints_are_no_answers(capfd):
    row = group("abcd", "ab", answer=[1])
    assert values(reward("mutates")([row, row])) == [[1.0, 0.5]] * 2
    assert row == group("abcd", "ab", answer=[1])
    assert values(reward("prints_garbage")([row])) == [[1.0, 0.5]]
    assert "9.0" in capfd.readouterr().err


def test_called_for_each_completion_it_costs_the_others_nothing():
    (found,) = reward("for_one", per="completion")([group("abcd", "bad", "ab", index=2)])
    assert [score.value for score in found] == [1.0, None, 0.5]
    assert "row 2, sample 1: its process ended by itself, with exit code 3" in found[1].reason


def test_none_is_a_missing_score_and_arrays_are_lists():
    (found,) = reward("forgets_one")([group("abcd", "ab")])
    assert [score.value for score in found] == [1.0, None]
    assert found[1].reason.endswith("row 0, sample 1: it gave no score")
    assert values(reward("as_array", memory_mb=None)([group("abcd", "ab")])) == [[1.0, 0.5]]


def test_a_function_sees_prompt_and_row_and_only_the_environment_it_may(monkeypatch):
    monkeypatch.setenv("SHOWN", "yes")
    monkeypatch.setenv("MY_SECRET", "no")
    talk = group("a", prompt=(Message("user", "Hi"),), answer=4, when=date(2026, 1, 2))
    ((score,),) = reward("sees", environment=("SHOWN",))([talk])
    assert "[[{'role': 'user', 'content': 'Hi'}], 4, '2026-01-02', 'yes', None]" in score.reason


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("nowhere.py:f", "FileNotFoundError"),
        ("no_such_package.module:f", "ModuleNotFoundError: No module named 'no_such_package'"),
        (f"{BAD}:absent", "has no attribute 'absent'"),
        (f"{BAD}:not_a_function", "`not_a_function` is no function"),
    ],
)
def test_a_function_that_cannot_be_loaded_stops_the_run_at_its_start(function, reason):
    with pytest.raises(ConfigError, match="the reward function cannot be loaded") as caught:
        FunctionReward(function=function).open(None)
    assert reason in str(caught.value)


def test_a_module_that_hangs_when_imported_stops_the_run_at_its_start(tmp_path):
    (tmp_path / "slow.py").write_text("while True: pass")
    with pytest.raises(ConfigError, match="took longer than the deadline"):
        FunctionReward(function=f"{tmp_path}/slow.py:f", load_deadline=0.3).open(None)


def test_a_function_of_a_package_is_found():
    scores = FunctionReward(function="operator:concat", per="completion").open(None)([group("a")])
    assert "TypeError" in scores[0][0].reason


def test_a_file_is_meant_from_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert FunctionReward(function="mine.py:f").function == f"{tmp_path}/mine.py:f"
    with pytest.raises(ValueError, match="write it as module.py:function"):
        FunctionReward(function="mine.py")
