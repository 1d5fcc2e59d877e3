"""Rows changed at random: none may end in a traceback, none may disappear."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from prefopt.data.check import Policy, examine, screened
from prefopt.data.formats import FORMATS
from prefopt.data.read import read_jsonl
from prefopt.data.render import Renderer, load_tokenizer
from prefopt.data.source import rows_of
from prefopt.errors import DataError

USER, REPLY, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "why"), ("assistant", "so"), ("assistant", "no"))
)
TURN, ANSWER, WORSE = ({"from": who, "value": text} for who, text in (("human", "why"), ("gpt", "so"), ("gpt", "no")))
BASES: dict[str, dict[str, Any]] = {
    "ultrafeedback": {
        "instruction": "why",
        "completions": [{"response": "so", "overall_score": 3}, {"response": "no", "overall_score": 1.5}],
    },
    "ultrafeedback_binarized": {
        "prompt": "why",
        "chosen": [USER, REPLY],
        "rejected": [USER, OTHER],
        "score_chosen": 8,
        "score_rejected": 2,
    },
    "sharegpt_preference": {"conversations": [TURN], "chosen": ANSWER, "rejected": WORSE, "system": "be kind"},
    "sharegpt_unpaired": {"conversations": [TURN, ANSWER], "kto_tag": True},
    "sharegpt": {"conversations": [TURN, ANSWER, TURN, ANSWER]},
    "alpaca_preference": {"instruction": "why", "input": "x", "chosen": "so", "rejected": "no"},
    "alpaca": {"instruction": "why", "input": "", "output": "so", "history": [["a", "b"]]},
    "preference": {"prompt": "why", "chosen": "so", "rejected": "no", "margin": 1.5, "votes": [2, 1], "weight": 2},
    "labelled_pair": {"prompt": "why", "a": "so", "b": "no", "raters": ["a", "tie", "b"]},
    "ranking": {"prompt": "why", "completions": ["so", "no", "eh"], "ranks": [1, 0, 2], "votes": [[0, 1, 2]]},
    "unpaired": {"prompt": "why", "completion": "so", "label": False},
    "prompt_completion": {"prompt": [USER], "completion": [REPLY]},
    "unpaired_messages": {"messages": [USER, REPLY], "label": True},
    "messages": {"messages": [USER, REPLY, USER, REPLY]},
    "hh": {"chosen": "\n\nHuman: why\n\nAssistant: so", "rejected": "\n\nHuman: why\n\nAssistant: no"},
    "preference_implicit": {"chosen": "why? so", "rejected": "why? no"},
    "message_pairs": {"chosen_messages": [USER, REPLY], "rejected_messages": [USER, OTHER]},
    "text": {"text": "once upon a time"},
    "prompt": {"prompt": "why"},
}
VALUES: list[Any] = [
    *(None, True, -1, 0, 1e308, 2**70, 10**400, float("nan"), float("inf"), "", " ", "x" * 5000, "\u0000", "\ud800"),
    *(
        "\n\nAssistant:",
        "\u2028",
        "\U0001f600",
        "<end>",
        [],
        {},
        [[]],
        [None],
        {"role": "user"},
        [USER],
        [REPLY],
        ["a", 1],
    ),
]
LINES = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[1]",
    b'"text"',
    b"{}" * 2,
    b"[" * 3000,
    b"1" * 5000,
    b'{"a":1,"a":2}',
    b"\x00",
]


def places(node: Any, prefix: tuple = ()) -> list[tuple]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    return [path for key, value in items for path in ((*prefix, key), *places(value, (*prefix, key)))]


def mutated(row: Any, draw: random.Random) -> Any:
    row = copy.deepcopy(row)
    for _ in range(draw.randint(1, 3)):
        found = places(row)
        if not found:
            break
        *parents, last = draw.choice(found)
        home = row
        for key in parents:
            home = home[key]
        action = draw.choice(["value", "value", "delete", "rename", "twice"])
        if action == "value":
            home[last] = copy.deepcopy(draw.choice(VALUES))
        elif action == "delete":
            del home[last]
        elif isinstance(home, dict):
            home[f"{last}_" if action == "rename" else "extra"] = home.pop(last) if action == "rename" else home[last]
        else:
            home.insert(last, copy.deepcopy(home[last]))
    return row


def line(row: Any, draw: random.Random) -> bytes:
    """A mutated row as a line of a file, once in a while with its bytes spoilt."""
    text = json.dumps(mutated(row, draw), ensure_ascii=draw.random() < 0.8).encode("utf-8", "surrogatepass")
    if draw.random() < 0.05:
        return text[: draw.randrange(len(text))]
    return draw.choice(LINES) if draw.random() < 0.05 else text


def test_every_format_has_a_base_and_reads_it():
    assert list(BASES) == [form.name for form in FORMATS]


def test_5000_mutated_rows(tmp_path, tiny_model):
    """Each file begins with a good row, so its format is known; every other row is usable or reported with its line."""
    draw, seen, good, bad = random.Random(0), 0, 0, 0
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    for name, base in BASES.items():
        lines = [json.dumps(base).encode(), *(line(base, draw).replace(b"\n", b" ") for _ in range(280))]
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"\n".join(lines))
        written = sum(not text.isspace() for text in lines if text)
        rows = rows_of(read_jsonl(path))
        assert rows.form.name == name
        report = examine(rows)
        assert len(report.good) + len(report.rejects) == report.total == written
        for reject in report.rejects:
            place = reject.problem.where.split(",")[0]
            assert place == rows.where(reject.index), reject
            assert reject.sort
            assert reject.problem.what
        renderer = Renderer(tokenizer, max_length=100, overflow="truncate", train_on=draw.choice(["last", "all"]))
        groups = [s for group, i in enumerate(report.good) for s in rows[i].sequences(group)]
        kept, tokens = renderer.render(groups, drop=True)
        assert len({s.group for s in kept}) + renderer.counts["rows/dropped"] == len({s.group for s in groups})
        assert all(t.completion and len(t) <= 100 and (t.trained is None or t.trained[-1]) for t in tokens)
        if report.rejects:
            try:
                screened(rows, Policy())
            except DataError as error:
                assert len(error.problems) == min(len(report.rejects), 51)
        seen, good, bad = seen + written - 1, good + len(report.good), bad + len(report.rejects)
    print(f"{seen} mutated rows: {good} usable, {bad} reported")
    assert seen >= 5000
    assert good > 500
    assert bad > 500
