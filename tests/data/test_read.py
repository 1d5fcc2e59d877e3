from __future__ import annotations

import gzip

import pytest

from prefopt.data.read import read_jsonl
from prefopt.errors import DataError


def test_records_keep_their_line_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": "\xe4\xbd\xa0\\n"}\r\n')
    assert [(r.where, r.data) for r in read_jsonl(path)] == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": "你\n"})]


def test_gzip_and_limit(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'))
    assert [r.data["a"] for r in read_jsonl(path, limit=2)] == [1, 2]


def test_every_bad_line_is_reported(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [b'{"a": 1}', b'{"a": ', b"[1]", b'{"a": 1, "a": 2}', b'{"a": "\xff"}', b"[" * 100_000]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    found = {p.where.rpartition(":")[2]: p.what for p in caught.value.problems}
    assert list(found) == ["2", "3", "4", "5", "6"]
    words = ["not JSON: Expecting value at column 6", "a row is an object", "`a` is written twice", "not UTF-8", "deep"]
    assert all(word in what for word, what in zip(words, found.values(), strict=True)), found


def test_long_lists_of_problems_are_cut_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("x\n" * 80)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert len(caught.value.problems) == 51
    assert caught.value.problems[-1].what == "and 30 more problems"


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\x1f\x8bbroken"])
def test_files_that_hold_nothing_readable(tmp_path, content):
    path = tmp_path / ("x.jsonl.gz" if content and content[:1] == b"\x1f" else "x.jsonl")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert caught.value.problems[0].where == str(path)


def test_a_damaged_gzip_file_is_a_data_error(tmp_path):
    whole = gzip.compress(b'{"prompt": "a"}\n' * 200)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[:12] + bytes(x ^ 255 for x in whole[12:30]) + whole[30:])
    with pytest.raises(DataError, match="cannot read the file") as caught:
        read_jsonl(path)
    assert caught.value.problems[0].where == str(path)
