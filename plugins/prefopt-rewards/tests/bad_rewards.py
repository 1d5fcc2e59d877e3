"""Reward functions that misbehave, each in its own way, where a completion or the row says `bad`; elsewhere they score
0.25 for each letter."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys


def good(prompt, completions, row):
    return [len(text) / 4 for text in completions]


def only_when_bad(misbehave):
    def function(prompt, completions, row):
        if "bad" in completions or row.get("bad"):
            return misbehave(prompt, completions, row)
        return good(prompt, completions, row)

    return function


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError


def fail(error):
    raise error


def hang(*_):
    while True:
        pass


def hang_in_c(*_):
    ctypes.CDLL(None).pause()


def recurse(*_):
    return recurse()


def allocate(*_):
    return [bytearray(2**24) for _ in itertools.count()]


def print_without_end(*_):
    line = "x" * 2**16
    while True:
        print(line)


def leave_a_child(*_):
    subprocess.Popen(["sleep", "73.25"])
    os._exit(3)


def close_everything(*_):
    os.closerange(0, 256)
    return [1.0, 1.0]


def answer_with(value):
    return only_when_bad(lambda *_: value)


raises = only_when_bad(lambda *_: fail(ValueError("no such thing")))
raises_unspeakably = only_when_bad(lambda *_: fail(Unspeakable()))
hangs = only_when_bad(hang)
hangs_in_c = only_when_bad(hang_in_c)
is_not_a_number = only_when_bad(lambda _, completions, __: [float("nan"), *[1.0] * len(completions[1:])])
is_infinite = only_when_bad(lambda _, completions, __: [*[1.0] * len(completions[1:]), float("inf")])
is_too_short = only_when_bad(lambda _, completions, __: [1.0] * len(completions[1:]))
is_one_value = answer_with(1.0)
is_text = answer_with("high")
holds_text = answer_with([1.0, "high"])
is_nothing = answer_with(None)
is_a_set = answer_with({1.0, 2.0})
is_huge = answer_with([0.123456789] * 2**20)
segfaults = only_when_bad(lambda *_: ctypes.string_at(0))
exits = only_when_bad(lambda *_: os._exit(3))
exits_politely = only_when_bad(lambda *_: sys.exit(3))
allocates = only_when_bad(allocate)
recurses = only_when_bad(recurse)
prints_without_end = only_when_bad(print_without_end)
leaves_a_child = only_when_bad(leave_a_child)
closes_everything = only_when_bad(close_everything)


def mutates(prompt, completions, row):
    found = good(prompt, completions, row)
    completions.append("more")
    row.clear()
    return found


def prints_garbage(prompt, completions, row):
    print('{"answer": [9.0, 9.0]}', flush=True)
    os.write(1, b'{"answer": [9.0, 9.0]}\n')
    sys.stdout.close()
    assert sys.stdin.read() == ""
    return good(prompt, completions, row)


def for_one(prompt, completion, row):
    if completion == "bad":
        os._exit(3)
    return len(completion) / 4


def forgets_one(prompt, completions, row):
    return (len(completions[0]) / 4, None)


def sees(prompt, completions, row):
    known = [prompt, row["answer"], str(row["when"]), os.environ.get("SHOWN"), os.environ.get("MY_SECRET")]
    raise ValueError(f"{known}")


def as_array(prompt, completions, row):
    import numpy as np

    return np.array([len(text) / 4 for text in completions], dtype=np.float32)


not_a_function = 3
