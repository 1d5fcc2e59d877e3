from __future__ import annotations

import pytest

from prefopt.config.yaml import Document, apply_overrides, dump, parse, read
from prefopt.errors import ConfigError

TEXT = """\
a: 1e-5
b: {c: no, d: 1:30}
e:
  - x
  - {f: 2}
g: ~
"""


def test_values_follow_yaml_1_2():
    assert parse(TEXT, "f").data == {"a": 1e-5, "b": {"c": "no", "d": "1:30"}, "e": ["x", {"f": 2}], "g": None}


def test_every_value_has_a_place():
    document = parse(TEXT, "f")
    places = {(): "f:1:1", ("a",): "f:1:1", ("b", "d"): "f:2:12", ("e", 1, "f"): "f:5:6", ("g",): "f:6:1"}
    assert {path: document.where(path) for path in places} == places
    assert document.where(("b", "missing", "deeper")) == "f:2:1"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1\na: 2", "f:2:1", "written twice"),
        ("a: [1,", "f:1:7", "not YAML"),
        ("a: 1\n\tb: 2", "f:2:1", "not YAML"),
        ("x: !!python/object:os.system y", "f:1:4", "tags are not allowed"),
        ("x: !mine y", "f:1:4", "tags are not allowed"),
        ("a: !!int x", "f:1:4", "'x' is no int"),
        ("a: 1\nb: !!float x", "f:2:4", "'x' is no float"),
        ("1: x", "f:1:1", "key must be text"),
        ("? [a]\n: x", "f:1:3", "key must be text"),
        ("a: &x {b: 1}\nc: {<<: *x}", "f:2:5", "merge keys"),
        ("a: \0", "f", "not YAML"),
    ],
)
def test_what_is_refused_is_located(text, place, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse(text, "f")
    assert caught.value.problems[0].where == place


def test_several_problems_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        parse("a: !x 1\nb: 2\nb: 3\n4: 5", "f")
    assert [p.where for p in caught.value.problems] == ["f:1:4", "f:3:1", "f:4:1"]


def test_aliases_work_and_bombs_do_not():
    assert parse("a: &x {b: 1}\nc: *x", "f").data == {"a": {"b": 1}, "c": {"b": 1}}
    bomb = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    with pytest.raises(ConfigError, match="too large"):
        parse(bomb, "f")
    with pytest.raises(ConfigError, match="too large or too deep"):
        parse("[" * 60 + "]" * 60, "f")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the file: No such file"):
        read(tmp_path / "none.yaml")
    (tmp_path / "latin").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(tmp_path / "latin")
    (tmp_path / "large").write_text("#" * 1_000_001)
    with pytest.raises(ConfigError, match="1,000,001 bytes"):
        read(tmp_path / "large")
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read(tmp_path / "bom").data == {"a": 1}


def test_overrides_are_yaml_values_and_leave_the_document_alone():
    document = parse(TEXT, "f")
    changed = apply_overrides(document, ["b.c=2.5", "h.i=[1, x]", "e.1.f=3", "g="])
    assert changed.data["b"] == {"c": 2.5, "d": "1:30"}
    assert changed.data["h"] == {"i": [1, "x"]}
    assert (changed.data["e"][1], changed.data["g"]) == ({"f": 3}, None)
    assert changed.where(("b", "c")) == "override `b.c`"
    assert changed.where(("b", "d")) == "f:2:12"
    assert document.data == parse(TEXT, "f").data


def test_all_bad_overrides_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        apply_overrides(parse(TEXT, "f"), ["nonsense", "a.b=1", "e.9=1", "b.c=[", "b.c=!x 1"])
    assert [p.where.partition(":")[0] for p in caught.value.problems] == [
        "command line",
        "override `a.b`",
        "override `e.9`",
        "override `b.c`",
        "override `b.c`",
    ]


def test_merging_goes_deep_and_replaces_what_has_another_name():
    base = parse("a: {name: x, lr: 1}\nb: {c: 1, d: 2}\ne: [1]", "base")
    top = parse("a: {name: y}\nb: {d: 3}\ne: [2]", "top")
    merged = base.merged(top)
    assert merged.data == {"a": {"name": "y"}, "b": {"c": 1, "d": 3}, "e": [2]}
    assert (merged.where(("b", "c")), merged.where(("b", "d"))) == ("base:2:5", "top:2:5")
    assert base.data["b"] == {"c": 1, "d": 2}


def test_a_part_keeps_its_places():
    part = parse(TEXT, "f").at("b")
    assert (part.data, part.where(("d",)), part.where(())) == ({"c": "no", "d": "1:30"}, "f:2:12", "f:2:1")
    assert parse(TEXT, "f").at("none", "deeper").data == {}


def test_what_is_dumped_is_read_again():
    data = {"b": {"lr": 1e-6, "none": None, "yes": True, "text": "no", "time": "1:30"}, "a": [1, "x: y", ""]}
    assert parse(dump(data), "f").data == data
    assert list(parse(dump(data), "f").data) == ["b", "a"]
    assert Document({}).at("x").data == {}
