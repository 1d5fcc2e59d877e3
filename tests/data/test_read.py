"""Records by index, each with its place; nothing of a file is held as a list."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.data.read import BadRow, Cell, read_csv, read_hub, read_json, read_jsonl, read_parquet
from prefopt.errors import DataError


def problems(records) -> dict[str, tuple[str, str]]:
    """Where, class and reason of each bad record."""
    found = {}
    for i in range(len(records)):
        try:
            records[i]
        except BadRow as error:
            (problem,) = error.problems
            found[problem.where.rpartition(":")[2]] = (error.sort, problem.what)
    return found


def test_records_keep_their_line_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": "\xe4\xbd\xa0\\n\xe2\x80\xa8"}\r\n{"a": 3}')
    records = read_jsonl(path)
    assert [(r.where, r.data) for r in records] == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:4", {"a": "你\n\u2028"}),
        (f"{path}:5", {"a": 3}),
    ]
    assert records[1].data == {"a": "你\n\u2028"}


def test_gzip_and_limit(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'))
    assert [r.data["a"] for r in read_jsonl(path, limit=2)] == [1, 2]
    records = read_jsonl(path)
    assert (len(records), records[2].data, records.where(2)) == (3, {"a": 3}, f"{path}:3")


def test_every_bad_line_is_reported(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [b'{"a": 1}', b'{"a": ', b"[1]", b'{"a": 1, "a": 2}', b'{"a": "\xff"}', b"[" * 100_000, b"1" * 5000]
    path.write_bytes(b"\n".join(lines))
    found = problems(read_jsonl(path))
    assert list(found) == ["2", "3", "4", "5", "6", "7"]
    sorts = ["not JSON", "not an object", "field twice", "not UTF-8", "not JSON", "not JSON"]
    assert [sort for sort, _ in found.values()] == sorts
    words = ["Expecting value at column 6", "a row is an object", "`a` is written twice", "not UTF-8", "deep", "digits"]
    assert all(word in what for word, (_, what) in zip(words, found.values(), strict=True)), found


NOTHING = {
    "no file": None,
    "empty": b"",
    "blank lines": b"\n\n",
    "not gzip": b"\x1f\x8bbroken",
    "cut short": gzip.compress(b"{}\n" * 99, mtime=0)[:-9],
}


@pytest.mark.parametrize("content", NOTHING.values(), ids=NOTHING)
def test_files_that_hold_nothing_readable(tmp_path, content):
    path = tmp_path / ("x.jsonl.gz" if content and content[:1] == b"\x1f" else "x.jsonl")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert caught.value.problems[0].where == str(path)


# --- JSON -----------------------------------------------------------------------------------------------------------


def test_a_json_list_knows_the_line_of_each_item(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[\n {"a": [1,\n 2]},\n {"a": "[{\\n"}, 7,\n\n {"b": 1, "b": 2}]', "utf-8")
    records = read_json(path)
    assert [records[0].data, records[1].data] == [{"a": [1, 2]}, {"a": "[{\n"}]
    assert [records.where(i) for i in range(4)] == [f"{path}:{line}" for line in (2, 4, 4, 6)]
    assert problems(records) == {
        "4": ("not an object", "a row is an object with named fields, not int"),
        "6": ("field twice", "field `b` is written twice"),
    }


@pytest.mark.parametrize(
    "data",
    [[{"a": 1}, {"a": 2}], {"data": [{"a": 1}, {"a": 2}]}, {"v": 1, "rows": [{"a": 1}, {"a": 2}]}, {"a": [1, 2]}],
)
def test_shapes_of_a_json_file(tmp_path, data):
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(json.dumps(data).encode("utf-8-sig")))
    assert [r.data for r in read_json(path)] == [{"a": 1}, {"a": 2}]
    assert len(read_json(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "line", "what", "fix"),
    [
        ('[\n{"a": 1},\n{"a": }]', ":3", "not JSON: Expecting value at column 7", ""),
        ('[{"a": 1}\n{"a": 2}]', ":2", "expected `,` or `]`", ""),
        ('[{"a": 1},', ":1", "not JSON", ""),
        ("[" * 100_000, "", "nested too deeply", ""),
        ('{"a": 1}\n{"a": 2}', ":2", "Extra data", "use source jsonl"),
        ('{"a": 1}', "", "neither a list of rows", "Write a list of objects"),
        ('{"a": [1], "b": [1, 2]}', "", "neither a list of rows", ""),
        ("3", "", "neither a list of rows", ""),
        ("", ":1", "not JSON", ""),
        ("[]", "", "has no rows", ""),
    ],
)
def test_json_files_that_cannot_be_read(tmp_path, text, line, what, fix):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_json(path)
    (problem,) = caught.value.problems
    assert problem.where == f"{path}{line}"
    assert what in problem.what
    assert fix in problem.fix


# --- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_quotes_line_ends_and_commas(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n"one\ntwo, ""three""",2\r\n\r\nthree,"\r\n"\r\nx\r\n')
    records = read_csv(path)
    assert [records[0].data, records[1].data] == [{"a": 'one\ntwo, "three"', "b": "2"}, {"a": "three", "b": "\r\n"}]
    assert [records.where(i) for i in range(3)] == [f"{path}:{line}" for line in (2, 5, 7)]
    assert problems(records) == {"7": ("not as wide as the header", "has 1 cells, but the header has 2")}
    assert isinstance(records[0].data["a"], Cell)
    assert len(read_csv(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a,a\n1,2\n", ":1", "`a` is named twice"),
        ('a\nx\n"y\n', ":3", "not CSV"),
        ("a,b\n", "", "no rows"),
        ("", "", "no"),
    ],
)
def test_csv_files_that_cannot_be_read(tmp_path, text, line, what):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=what) as caught:
        read_csv(path)
    assert caught.value.problems[0].where == f"{path}{line}"


# --- Parquet and hub data sets --------------------------------------------------------------------------------------

ROWS = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "你", "chosen": "c", "rejected": None}]


def test_parquet_by_row_number(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 50), path, row_group_size=7)
    records = read_parquet(path)
    assert (len(records), records.where(99)) == (100, f"{path}, row 99")
    assert (records[99].data, records[98].data) == ({"prompt": "你", "chosen": "c"}, ROWS[0])
    assert len(read_parquet(path, limit=10)) == 10


def test_parquet_that_cannot_be_read(tmp_path):
    for name, content in (("none", None), ("broken", b"PAR1 and no more")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match="cannot read the file"):
            read_parquet(path)


def test_a_saved_data_set_is_read_by_split(tmp_path):
    made = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(str(tmp_path / "both"))
    made.save_to_disk(str(tmp_path / "one"))
    records = read_hub(str(tmp_path / "both"), None, "test", None)
    assert [(r.where, r.data) for r in records] == [
        (f"{tmp_path}/both, split test, row 0", {"prompt": "你", "chosen": "c"})
    ]
    assert len(read_hub(str(tmp_path / "one"), None, "train", None)) == 2


def test_a_folder_of_files_is_read_as_the_hub_would(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "p"}\n')
    assert read_hub(str(tmp_path / "data"), None, "train", None)[0].data == {"prompt": "p"}


@pytest.mark.parametrize(("name", "split"), [("nobody/nothing-of-this-name", "train"), ("saved", "dev")])
def test_a_data_set_that_cannot_be_loaded_says_why(tmp_path, name, split):
    path = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path))
    with pytest.raises(DataError, match="cannot load the data set") as caught:
        read_hub(str(path) if name == "saved" else name, None, split, None)
    assert f", split {split}" in caught.value.problems[0].where


def test_a_damaged_gzip_file_is_a_data_error(tmp_path):
    whole = gzip.compress(b'{"prompt": "a"}\n' * 200)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[:12] + bytes(x ^ 255 for x in whole[12:30]) + whole[30:])
    with pytest.raises(DataError, match="cannot read the file") as caught:
        read_jsonl(path)
    assert caught.value.problems[0].where == str(path)
