"""Every table format gives its rows; a damaged table gives its intact rows."""

import json
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import write_images
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column, field_text
from xlsd_cache.files.table_cells import read_columns
from xlsd_cache.files.uri import read_source, stat_source
from xlsd_cache.sources.scan import Scan, scan
from xlsd_cache.tables.rows import read_rows

CONVERSATION = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a cat"}]


def told(found: Scan) -> dict[str, str]:
    return {c["key"]: c["text"] for c in found.captions.to_pylist()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "im", ["a.png", "sub/b.png"], width=16, height=16)
    for text in (tmp_path / "im").rglob("*.txt"):
        text.unlink()
    return tmp_path / "im"


TABLES: dict[str, tuple[str, str, bytes]] = {
    "csv": ("metadata.csv", "csv:text", b'file_name,text\na.png,"one, two"\nsub/b.png,b\n'),
    "csv with BOM and CRLF": (
        "metadata.csv", "csv:text",
        b'\xef\xbb\xbffile_name,text\r\na.png,"one,\r\ntwo"\r\nsub/b.png,b\r\n',
    ),
    "csv with semicolons": ("x.csv", "csv:text", b"text;file_name\none, two;a.png\nb;sub/b.png\n"),
    "tsv": ("x.tsv", "csv:text", b"file_name\ttext\na.png\tone, two\nsub/b.png\tb\n"),
    "array": (
        "list.json", "jsonl:text",
        b'[{"file_name": "a.png", "text": "one, two"},\n {"file_name": "sub/b.png", "text": "b"}]',
    ),
    "array called jsonl": (
        "list.jsonl", "jsonl:text",
        b' [{"file_name": "a.png", "text": "one, two"}, {"file_name": "sub/b.png", "text": "b"}]',
    ),
    "kohya by stem": (
        "meta_cap.json", "jsonl:caption",
        b'{"a": {"caption": "one, two", "id": 7}, "sub/b": {"caption": "b", "size": [1, 2]}}',
    ),
    "kohya by path": (
        "meta_cap.json", "jsonl:tags",
        b'{"a.png": {"tags": "one, two"}, "sub/b.png": {"tags": "b"}}',
    ),
    "list of tags": (
        "m.jsonl", "jsonl:t.v",
        b'{"file_name": "a.png", "t": {"v": ["one", "two"]}}\n{"key": "sub/b", "t": {"v": "b"}}',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_text_tables_in_a_folder_serve_its_images(folder: Path, name: str) -> None:
    file, column, data = TABLES[name]
    (folder / file).write_bytes(data)
    found = scan((str(folder),), (column,))
    assert told(found) == {"im/a.png": "one, two", "im/sub/b.png": "b"}
    assert not found.damaged
    assert told(scan((str(folder), str(folder / file)), (column,))) == told(found)


@pytest.mark.parametrize("name", [*TABLES, "parquet", "txt"])
def test_auto_takes_what_the_images_have(folder: Path, name: str) -> None:
    if name == "txt":
        (folder / "a.txt").write_text("one, two")
        (folder / "sub/b.txt").write_text("b")
        (folder / "metadata.csv").write_text("file_name,text\na.png,not this\n")
        column = "txt"
    elif name == "parquet":
        column = "parquet:caption"
        table = pa.table({"file_name": ["a.png", "sub/b.png"], "caption": ["one, two", "b"]})
        pq.write_table(table, folder / "x.parquet")
    else:
        file, column, data = TABLES[name]
        (folder / file).write_bytes(data)
    found = scan((str(folder),), None)
    if column.partition(":")[2] in ("tags", "t.v"):
        assert not told(found)
    else:
        assert found.columns == (column,)
        assert told(found) == {"im/a.png": "one, two", "im/sub/b.png": "b"}


def test_json_that_is_no_table_is_passed_over(folder: Path) -> None:
    for name, value in {
        "settings": {"a": {"b": 1}}, "info": {"caption": "of nothing"}, "empty": {}, "none": [],
        "dataset_info": {"features": {"text": {"dtype": "string"}}}, "numbers": [1, 2],
    }.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "m.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "it"}))
    found = scan((str(folder),), ("jsonl:text",))
    assert told(found) == {"im/a.png": "it"}
    assert found.matches.summary() == ["m.jsonl: 1 rows, 1 used"]


@pytest.mark.parametrize(
    ("value", "field", "text"),
    [
        ({"c": CONVERSATION}, "c.value", "<image> what?\na cat"),
        ({"c": CONVERSATION}, "c.1.value", "a cat"),
        ({"c": CONVERSATION}, "c.-1.value", "a cat"),
        ({"c": CONVERSATION}, "c.9.value", ""),
        ({"c": CONVERSATION}, "c.none", ""),
        ({"c": CONVERSATION}, "c", ""),
        ({"c": [["a", "b"]]}, "c.0", "a, b"),
        ({"c": [{"v": ["a", "b"]}, {"v": ["c"]}, {}]}, "c.v", "a, b\nc"),
        ({"a.b": "dotted", "a": {"b": "deep"}}, "a.b", "dotted"),
        ({"a": "text"}, "a.b", ""),
    ],
)
def test_fields_lead_through_objects_and_lists(
    tmp_path: Path, value: dict[str, Any], field: str, text: str
) -> None:
    assert field_text(value, field)[0] == text
    if "a.b" in value or value == {"c": [["a", "b"]]}:
        return  # a parquet column of another shape
    for suffix, write in (("parquet", pq.write_table), ("arrow", write_stream)):
        file = tmp_path / f"t.{suffix}"
        write(pa.table({"file_name": ["a.png"], **{k: [v] for k, v in value.items()}}), file)
        rows = read_rows(file, (Column.parse(f"parquet:{field}"),))
        assert rows.captions[f"parquet:{field}"].to_pylist() == [text or None]


def write_stream(table: pa.Table, file: Path) -> None:
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
)
def test_every_type_of_string_is_a_name_and_a_caption(folder: Path, kind: pa.DataType) -> None:
    values = {"file_name": ["a.png", "sub/b.png"], "text": ["one", " two  three"]}
    columns = {name: pa.array(value, pa.string()).cast(kind) for name, value in values.items()}
    pq.write_table(pa.table(columns), folder / "t.parquet")
    found = scan((str(folder),), ("parquet:text",))
    assert told(found) == {"im/a.png": "one", "im/sub/b.png": "two three"}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("how", ["parquet", "stream", "feather"])
def test_images_in_cells_of_every_type_and_file(folder: Path, kind: pa.DataType, how: str) -> None:
    data = [(folder / name).read_bytes() for name in ("a.png", "sub/b.png", "a.png")]
    cells = pa.array(data, pa.binary()).cast(kind)
    image = pa.StructArray.from_arrays(
        [cells, pa.array(["x.png", "x.png", None])], ["bytes", "path"]
    )
    table = pa.table({"image": image, "text": ["one", "two", "three"]})
    file = (
        folder.parent / "set" / ("t.parquet" if how == "parquet" else "data-00000-of-00001.arrow")
    )
    file.parent.mkdir()
    if how == "parquet":
        whole = kind == pa.binary_view()  # which pyarrow cannot slice yet
        pq.write_table(table, file, row_group_size=3 if whole else 2)
    elif how == "stream":
        write_stream(table, file)
        (file.parent / "cache-1.arrow").write_bytes(b"not ours")
        told_files = json.dumps({"_data_files": [{"filename": file.name}]})
        (file.parent / "state.json").write_text(told_files)
    else:
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    for source in (file, file.parent):
        found = scan((str(source),), ("parquet:text",))
        assert list(told(found).values()) == ["one", "two", "three"]
        images = found.images.to_pylist()
        assert [read_source(image["source"]) for image in images] == data
        for image in images:
            assert stat_source(image["source"])[:2] == (image["size"], image["mtime_ns"])
        assert not found.damaged


def test_a_broken_table_costs_itself(folder: Path) -> None:
    (folder / "m.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "it"}))
    for name in ("broken.jsonl", "broken.csv", "empty.jsonl", "broken.parquet", "data-0.arrow"):
        (folder / name).write_bytes(b"" if "empty" in name else b"\xff{]" * 9)
    found = scan(
        (str(folder), str(folder / "empty.jsonl")), ("jsonl:text", "csv:text", "parquet:text")
    )
    assert told(found) == {"im/a.png": "it"}
    assert found.unread
    for name in ("broken.jsonl", "empty.jsonl", "broken.parquet", "data-0.arrow"):
        assert any(name in sentence for sentence in found.damaged)
    with pytest.raises(UserError, match="empty.jsonl"):
        scan((str(folder / "empty.jsonl"),), ("jsonl:text",))


@settings(max_examples=60)
@given(
    st.binary(max_size=200),
    st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "arrow", "jgz"]),
)
def test_any_bytes_are_rows_or_a_sentence(tmp_path_factory: Any, data: bytes, suffix: str) -> None:
    file = tmp_path_factory.mktemp("any") / f"t.{suffix}"
    file.write_bytes(data)
    columns = tuple(map(Column.parse, ("jsonl:text", "csv:text", "parquet:text")))
    with suppress(UserError):
        rows = read_rows(file, columns)
        assert all(len(texts) == len(rows) for texts in rows.captions.values())


def test_json_nested_beyond_reason_is_broken_json(folder: Path) -> None:
    deep = b'{"file_name": "a.png", "text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (folder / "m.jsonl").write_bytes(deep + b'\n{"file_name": "a.png", "text": "it"}')
    (folder / "m.json").write_bytes(b"[" + deep + b"]")
    assert told(scan((str(folder),), ("jsonl:text",))) == {"im/a.png": "it"}


def test_masks_are_rejected_only_beside_their_image(tmp_path: Path) -> None:
    names = (
        "a.png a-masklabel.png a-condlabel.png a_mask.png A_MASK.png a_depth.jpg a.seg.png "
        "lone_mask.png sub/a_mask.png 0.image.png 0.mask.png mask.png"
    ).split()
    write_images(tmp_path / "im", names, width=16, height=16)
    found = scan((str(tmp_path / "im"),), ())
    rejected = {i["key"].removeprefix("im/"): i["detail"] for i in found.images.to_pylist()
                if i["reason"] == "mask"}  # fmt: skip
    assert set(rejected) == {
        "a-masklabel.png", "a-condlabel.png", "a_mask.png", "a_depth.jpg", "a.seg.png", "0.mask.png"
    }  # fmt: skip
    assert rejected["a_mask.png"] == "by its name, of im/a"
    assert found.images.num_rows == len(names)


@pytest.mark.parametrize("tar", [True, False])
def test_one_image_of_a_sample_is_chosen_by_its_suffix(tmp_path: Path, tar: bool) -> None:
    for i in range(2):
        names = [f"{i}.image.png", f"{i}.other.png", f"{i}.mask.png"]
        write_images(tmp_path / "im", names, width=16, height=16)
        (tmp_path / f"im/{i}.txt").write_text(f"of sample {i}")
    source = tmp_path / "im"
    if tar:
        source = tmp_path / "x.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(tmp_path / "im", ".")
    found = scan((str(source),), ("txt",), image_suffixes=("image.png",))
    name = source.name
    assert told(found) == {f"{name}/{i}.image.png": f"of sample {i}" for i in range(2)}
    assert found.passed_over["other images"] == 4


@pytest.mark.parametrize(
    "how",
    [{}, {"use_dictionary": False}, {"row_group_size": 70}, {"dictionary_pagesize_limit": 2000},
     {"use_dictionary": False, "column_encoding": {"few": "DELTA_BYTE_ARRAY"}}],
    ids=str,
)  # fmt: skip
def test_however_many_rows_are_read_at_once_they_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """Few at a time, or as the texts that rows name: as a small file is read, all at once."""
    table = pa.table({
        "few": ["x", None, "yy"] * 200,
        "large": pa.array(["a", "b" * 9, None] * 200, pa.large_string()),
        "each": [f"text {i}" * 3 for i in range(600)],
        "tags": [["p", "q"], None, []] * 200,
        "image": [{"bytes": b"1", "path": "k"}, None, {"bytes": None, "path": "l"}] * 200,
        "nothing": pa.nulls(600, pa.string()),
        "number": range(600),
    })  # fmt: skip
    for name, part in (("all.parquet", table), ("none.parquet", table.slice(0, 0))):
        pq.write_table(part, tmp_path / name, **how)
        for columns in (["few", "each", "nothing"], table.column_names, ["image.path"], ["number"]):
            expected = pq.ParquetFile(tmp_path / name).read(columns=columns).combine_chunks()
            for budget in (2**30, 40_000):  # bytes read at once
                monkeypatch.setattr("xlsd_cache.files.table_cells._TABLE_BYTES", budget)
                monkeypatch.setattr("xlsd_cache.files.table_cells._TIMES", 1000)
                got = read_columns(tmp_path / name, columns)
                assert got.combine_chunks().equals(expected), (columns, budget)


def test_one_long_text_named_by_many_rows_is_refused_before_it_is_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xlsd_cache.files.table_cells._TABLE_BYTES", 2**24)
    table = pa.table({"text": pa.repeat("x" * 2**20, 3).dictionary_encode().take([0] * 5000)})
    pq.write_table(table, tmp_path / "bomb.parquet", dictionary_pagesize_limit=2**22)
    assert (tmp_path / "bomb.parquet").stat().st_size < 2**18
    with pytest.raises(pa.ArrowInvalid, match="hold more than 16 MiB of texts"):
        read_columns(tmp_path / "bomb.parquet", ["text"])


def test_many_long_texts_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xlsd_cache.files.table_cells._TABLE_BYTES", 2**20)
    monkeypatch.setattr("xlsd_cache.files.table_cells._TIMES", 1000)
    monkeypatch.setattr("xlsd_cache.files.table_cells._DECODED_BYTES", 2**16)
    table = pa.table({"text": [f"{i:04d}" * 100 for i in range(3000)]})
    pq.write_table(table, tmp_path / "long.parquet")
    got = read_columns(tmp_path / "long.parquet", ["text"])
    assert got.combine_chunks().equals(table.combine_chunks())
    assert got["text"].num_chunks > 10
