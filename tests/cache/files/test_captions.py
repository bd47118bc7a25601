import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.files.captions import Column, field_text, read_captions, read_text, value_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("name", "kind", "field", "suffix"),
    [
        ("txt", "sidecar", "txt", "txt"),
        ("wd.txt", "sidecar", "wd.txt", "wd.txt"),
        ("json:caption", "json", "caption", "json"),
        ("jsonl:wd-eva02-large-v3", "jsonl", "wd-eva02-large-v3", None),
        ("parquet:a.b", "parquet", "a.b", None),
    ],
)
def test_a_columns_name_says_where_it_is(
    name: str, kind: str, field: str, suffix: str | None
) -> None:
    column = Column.parse(name)
    assert (column.name, column.kind, column.field) == (name, kind, field)
    assert column.suffix == suffix


@pytest.mark.parametrize("name", ["tsv:tags", "json:", "a/b"])
def test_a_name_that_says_nothing_findable_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Column.parse(name)


@pytest.mark.parametrize(
    ("data", "text", "remarks"),
    [
        (b"parrots, 2birds\r\n", "parrots, 2birds", []),
        (b"one\n\n  two \n", "one\ntwo", []),
        ("\ufeffbom".encode(), "bom", []),
        ("été".encode("utf-16"), "été", []),
        ("été".encode("utf-16-be").join([b"\xfe\xff", b""]), "été", []),
        ("été".encode("latin-1"), "été", ["not UTF-8, read as Latin-1"]),
        (b"par\0rots", "parrots", ["with NUL removed"]),
        (b"", "", ["empty or blank"]),
        (b" \n\t\n", "", ["empty or blank"]),
        (b"\0\0", "", ["empty or blank"]),
    ],
)
def test_sidecars_in_every_encoding(data: bytes, text: str, remarks: list[str]) -> None:
    assert read_text(data) == (text, remarks)


@pytest.mark.parametrize(
    ("value", "text", "remarks"),
    [
        ("a  photo\nof a cat ", "a photo of a cat", []),
        (["woman", " solo", "", 2], "woman, solo, 2", []),
        ({"1girl": 0.98, "sky": 0.4}, "1girl, sky", []),
        (7, "7", []),
        ("a\0b", "ab", ["with NUL removed"]),
        ("half \ud83d an emoji", "half ? an emoji", []),
        (None, "", ["missing"]),
        ("  ", "", ["empty or blank"]),
        ([], "", ["empty or blank"]),
        (True, "", ["not text"]),
        ([["nested"]], "", ["not text"]),
    ],
)
def test_fields_are_one_caption_each(value: Any, text: str, remarks: list[str]) -> None:
    assert value_text(value) == (text, remarks)


@given(JSON)
def test_no_value_of_a_field_raises_or_breaks_the_tables(value: Any) -> None:
    text, _ = value_text(value)
    assert text == text.encode().decode()
    assert "\0" not in text
    assert text.split() == [] or text == " ".join(text.split())


@given(st.binary())
def test_no_bytes_of_a_sidecar_raise(data: bytes) -> None:
    text, _ = read_text(data)
    assert "\0" not in text
    assert all(line == line.strip() != "" for line in text.splitlines())


def test_a_field_may_lie_deeper_and_a_dotted_name_wins() -> None:
    value = {"a": {"b": {"c": "deep"}}, "x.y": "plain", "x": {"y": "deeper"}}
    assert field_text(value, "a.b.c") == ("deep", [])
    assert field_text(value, "x.y") == ("plain", [])
    assert field_text(value, "a.z") == ("", ["missing"])
    assert field_text("no object", "a") == ("", ["missing"])


def test_several_columns_of_one_image_and_what_is_said_of_them() -> None:
    beside = {"txt": b"tags", "json": json.dumps({"caption": "a cat", "n": None}).encode()}
    names = ("txt", "moon", "json:caption", "json:n", "jsonl:tags")
    texts, remarks = read_captions(tuple(map(Column.parse, names)), beside.get)
    assert texts == {"txt": "tags", "json:caption": "a cat"}
    assert remarks == Counter({("moon", "missing"): 1, ("json:n", "missing"): 1})
    broken = {"json": b"{'not': json"}
    texts, remarks = read_captions((Column.parse("json:caption"),), broken.get)
    assert (texts, remarks) == ({}, Counter({("json:caption", "in a file that is not JSON"): 1}))
