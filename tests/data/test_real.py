"""Real data sets, as they were published: every file is read, or refused with a place and what to do about it.

They are found by `PREFOPT_DATA`; no text of them is kept here.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from prefopt.builtin.sources import BY_SUFFIX
from prefopt.cli.data import file_rows, suffix
from prefopt.data.check import Report, examine
from prefopt.data.render import Renderer, load_tokenizer
from prefopt.errors import DataError
from prefopt.rows import Comparison, Completion, Role, Row

# What `data check FILE` finds: format, shape, rows, bad rows. Files that need `data.columns` are below.
RECOGNISED = {
    "hh-rlhf/harmless-base/test.jsonl.gz": ("hh, plain text", 2312),
    "llamafactory-demos/data/alpaca_en_demo.json": ("alpaca, conversations", 999),
    "llamafactory-demos/data/alpaca_zh_demo.json": ("alpaca, conversations", 1000),
    "llamafactory-demos/data/identity.json": ("alpaca, conversations", 91),
    "llamafactory-demos/data/dpo_en_demo.json": ("sharegpt_preference, conversations", 300),
    "llamafactory-demos/data/dpo_zh_demo.json": ("sharegpt_preference, conversations", 300),
    "llamafactory-demos/data/kto_en_demo.json": ("unpaired_messages, conversations", 300),
    "llamafactory-demos/data/v1_dpo_demo.jsonl": ("message_pairs, conversations", 10),
    "llamafactory-demos/data/v1_sft_demo.jsonl": ("messages, conversations", 500),
    "mt-bench/data/dummy_conversation.json": ("sharegpt, conversations", 500),
    "xstest/xstest_prompts.csv": ("prompt, plain text", 450),
    "xstest/xstest_v2_completions_mistralinstruct.csv": ("prompt_completion, plain text", 450),
}
EVALS = {
    "columns": {
        "prompt": "question",
        "chosen": "answer_matching_behavior",
        "rejected": "answer_not_matching_behavior",
    }
}
LLMBAR = {"columns": {"prompt": "input", "a": "output_1", "b": "output_2"}, "labels": {"a": 1, "b": 2}}
PANDALM = {
    "columns": {
        "prompt": ["instruction", "input"],
        "a": "response1",
        "b": "response2",
        "raters": ["annotator1", "annotator2", "annotator3"],
    },
    "labels": {"a": 1, "b": 2, "tie": 0},
}
# With the settings a configuration would have: rows, bad rows.
MAPPED = [
    ("anthropic-evals/persona/*.jsonl", EVALS, [1000] * 4, 0),
    ("anthropic-evals/advanced-ai-risk/*/*.jsonl", EVALS, [340, 953], 0),
    (
        "hhh-alignment/*.json",
        {"columns": {"chosen": "chosen_instruction", "rejected": "rejected_instruction"}},
        [221],
        0,
    ),
    ("llmbar/Dataset/LLMBar/**/*.json", LLMBAR, [92, 47, 46, 134, 100, 100, 100], 0),
    ("pandalm/data/testset-v1.json", PANDALM, [999], 6),  # six replies are `true`, which is no text
    ("pandalm/data/testset-inference-v1.json", {"columns": {"prompt": ["instruction", "input"]}}, [170], 0),
    ("mt-bench/fastchat/llm_judge/data/*/question.jsonl", {"columns": {"prompt": "turns.0"}}, [80, 80], 0),
    ("truthfulqa-csv/*.csv", {"columns": {"prompt": "Question", "completion": "Best Answer"}}, [813], 0),
    (
        "xstest/xstest_v2*.csv",
        {
            "columns": {"label": "final_label"},
            "labels": {"desirable": "1_full_compliance", "undesirable": ["2_full_refusal", "3_partial_refusal"]},
        },
        [450],
        0,
    ),
]


@pytest.fixture
def real(shared) -> Path:
    if not (shared / "data").is_dir():
        pytest.skip(f"no real data at {shared}/data; set PREFOPT_DATA")
    return shared / "data"


def rows_with(path: Path, settings: dict):
    return BY_SUFFIX[suffix(path)].model_validate_json(json.dumps({"path": str(path), **settings}), strict=True).rows()


def test_every_file_is_read_or_refused_with_a_place_and_a_cure(real):
    files = [path for path in sorted(real.rglob("*")) if path.is_file()]
    read, refused = {}, 0
    for path in files:
        try:
            rows = file_rows(path)
            report = examine(rows)
            assert not report.rejects, report.rejects[0]
            read[str(path.relative_to(real))] = (", ".join(str(rows).split(":")[0].split(", ")[:2]), report.total)
        except DataError as error:
            refused += 1
            (problem,) = error.problems
            assert problem.where.startswith(str(path))
            assert "data.columns" in problem.fix or "as JSONL" in problem.fix, problem
    assert read == RECOGNISED
    assert refused == len(files) - len(RECOGNISED)


@pytest.mark.parametrize(("pattern", "settings", "sizes", "bad"), MAPPED, ids=[m[0] for m in MAPPED])
def test_what_is_not_recognised_is_read_with_columns_and_labels(real, pattern, settings, sizes, bad):
    reports = [examine(rows_with(path, settings)) for path in sorted(real.glob(pattern))]
    assert [r.total for r in reports] == sizes
    assert sum(len(r.rejects) for r in reports) == bad


def looked_at(path: Path, **settings) -> tuple[list[Row], Report]:
    rows = rows_with(path, settings)
    report = examine(rows)
    return [rows[i] for i in report.good], report


@cache
def dialogues(real: Path) -> tuple[list[Row], Report]:
    return looked_at(real / "hh-rlhf/harmless-base/test.jsonl.gz")


def test_hh_pairs_that_part_early_empty_answers_and_many_turns(real):
    rows, report = dialogues(real)
    assert report.remarks["empty completions"] == 4
    assert all(row.prompt.startswith("\n\nHuman: ") and row.prompt.endswith("\n\nAssistant:") for row in rows)
    turn = "\n\nAssistant:"
    early = [row for row in rows if turn in row.chosen.text or turn in row.rejected.text]
    assert len(early) == report.remarks["completions with further turns"] == 5
    assert max((row.prompt + row.chosen.text).count("\n\nHuman:") for row in rows) == 18
    longer = sum(len(row.chosen.text) > len(row.rejected.text) for row in rows)
    assert round(longer / len(rows), 2) == 0.44


def test_sharegpt_pairs_have_up_to_13_turns_and_80_begin_with_a_system_turn(real):
    rows, _ = looked_at(real / "llamafactory-demos/data/dpo_en_demo.json")
    assert (min(len(r.prompt) for r in rows), max(len(r.prompt) for r in rows)) == (1, 13)
    assert sum(row.prompt[0].role == "system" for row in rows) == 80


def test_pandalm_ties_are_zero_and_raters_become_soft_labels(real):
    rows, report = looked_at(real / "pandalm/data/testset-v1.json", **PANDALM)
    assert [reject.sort for reject in report.rejects] == ["not text"] * 6
    assert all("bool True" in reject.problem.what for reject in report.rejects)
    marks = [[data[f"annotator{i}"] for i in (1, 2, 3)] for data in _raw(real / "pandalm/data/testset-v1.json")]
    assert sum(len(set(m)) == 1 for m in marks) == 879
    assert sum(m.count(0) > 1 for m in marks) == 105
    left = [m for i, m in enumerate(marks) if i not in {reject.index for reject in report.rejects}]
    assert Counter(sum(row.votes[2:]) for row in rows) == Counter(m.count(0) for m in left)
    assert Counter(max(row.votes[:2]) for row in rows) == Counter(max(m.count(1), m.count(2)) for m in left)
    assert all(type(row) is Comparison and 0.5 <= row.preference <= 1 for row in rows)


def test_llmbar_labels_are_1_and_2(real):
    path = real / "llmbar/Dataset/LLMBar/Natural/dataset.json"
    rows, _ = looked_at(path, **LLMBAR)
    second = sum(row.chosen.text == data["output_2"] for row, data in zip(rows, _raw(path), strict=True))
    assert second == sum(data["label"] == 2 for data in _raw(path))
    assert {row.preference for row in rows} == {1.0}


def _raw(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))


def test_csv_files_quote_line_ends(real):
    rows, _ = looked_at(real / "xstest/xstest_v2_completions_mistralinstruct.csv")
    assert len(rows) == 450
    assert sum("\n" in row.completion.text for row in rows) > 100


def test_other_scripts_quotes_and_signs_survive(real):
    rows, _ = looked_at(real / "llamafactory-demos/data/alpaca_zh_demo.json")
    texts = [row.completion.text for row in rows]
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in text) for text in texts) > 900
    found, _ = dialogues(real)
    assert any("\u2019" in row.chosen.text for row in found)


# --- real tokenizers ------------------------------------------------------------------------------------------------

MODELS = ("stories260K", "TinyStories-656K", "TinyStories-656K-upstream")


@pytest.mark.parametrize("name", MODELS)
def test_real_tokenizers_begin_once_and_end_and_lose_no_text(real, shared, name):
    path = shared / "models" / name
    if not path.is_dir():
        pytest.skip(f"no model at {path}")
    renderer = Renderer(load_tokenizer(str(path)), max_length=10_000)
    rows, _ = dialogues(real)
    sequences = [s for group, row in enumerate(rows[:60]) for s in row.sequences(group)]
    kept, tokens = renderer.render(sequences)
    tokenizer = renderer.tokenizer
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert len(kept) == 120
    for sequence, found in zip(kept, tokens, strict=True):
        assert found.completion[-1] == end
        whole = [*found.prompt, *found.completion[:-1]]
        joint = tokenizer(sequence.prompt + sequence.completion.text, add_special_tokens=False)["input_ids"]
        assert whole in ([begin, *joint], joint)
        assert whole.count(begin) == (whole[0] == begin)
    assert {s.role for s in kept} == {Role.CHOSEN, Role.REJECTED}


def test_a_completion_is_encoded_behind_its_prompt_and_not_alone(shared):
    """A word encoded alone gains a dummy space with this tokenizer, so its tokens are not those the model would read;
    with the other one the prompt's tokens are no prefix of the joint ones."""
    path = shared / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"no model at {path}")
    renderer = Renderer(load_tokenizer(str(path)))
    alone = renderer.tokenizer("aby", add_special_tokens=False)["input_ids"]
    found = renderer.tokens("The b", Completion("aby"))
    assert renderer.tokenizer.decode([*found.prompt, *found.completion], skip_special_tokens=True) == "The baby"
    assert renderer.tokenizer.decode([*found.prompt, *alone], skip_special_tokens=True) != "The baby"


def test_a_prompt_that_is_no_prefix_of_the_joint_tokens_is_counted(shared):
    path = shared / "models" / "TinyStories-656K"
    if not path.is_dir():
        pytest.skip(f"no model at {path}")
    renderer = Renderer(load_tokenizer(str(path)))
    found = renderer.tokens("The little g", Completion("irl"))
    joint = renderer.tokenizer("The little girl", add_special_tokens=False)["input_ids"]
    assert [*found.prompt, *found.completion[:-1]][-len(joint) :] == joint
    assert renderer.counts["prompts/merged"] == 1
