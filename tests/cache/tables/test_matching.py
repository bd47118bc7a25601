"""A caption is only matched to the image that it was written for."""

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import write_images
from xlsd_cache.files.captions import Column
from xlsd_cache.files.uri import read_source
from xlsd_cache.sources.scan import Scan, scan
from xlsd_cache.tables.columns import Rows
from xlsd_cache.tables.matching import captions_of, match
from xlsd_cache.tables.names import canonical
from xlsd_cache.tables.row_outcomes import NO_IMAGE, SEVERAL, Table
from xlsd_cache.tables.rows import read_rows

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = "jsonl:text"


def lines(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def shard(file: Path, data: list[bytes | None], paths: list[str | None], texts: list[str]) -> Path:
    images = pa.array([{"bytes": b, "path": p} for b, p in zip(data, paths, strict=True)], IMAGE)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "text": texts}), file)
    return file


def told(found: Scan, column: str = TEXT) -> dict[str, str | None]:
    """The caption of every image."""
    said: dict[str, str | None] = dict.fromkeys(found.images["key"].to_pylist())
    said |= {c["key"]: c["text"] for c in found.captions.to_pylist() if c["column"] == column}
    return said


def counts(found: Scan) -> list[tuple[int, int, int]]:
    return [found.matches.counts(number) for number in range(len(found.matches.tables))]


def test_a_table_that_embeds_images_speaks_for_those_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "im", ["000000000.png", "1.png"])
    names = ("000000000.png", "1.png")
    data: list[bytes | None] = [(tmp_path / "im" / name).read_bytes() for name in names]
    sources = [
        shard(tmp_path / "a.parquet", data, [None, None], ["a0", "a1"]),
        shard(tmp_path / "b.parquet", data, ["1.png", "1.png"], ["b0", "b1"]),
        shard(tmp_path / "im" / "c.parquet", data, ["1.png", "x/2.png"], ["c0", "c1"]),
    ]
    found = scan(tuple(map(str, [*sources[:2], tmp_path / "im"])), ("parquet:text",))
    assert told(found, "parquet:text") == {
        "a.parquet/000000000": "a0", "a.parquet/000000001": "a1",
        "b.parquet/000000000": "b0", "b.parquet/000000001": "b1",
        "im/c.parquet/1.png": "c0", "im/c.parquet/x/2.png": "c1",
        "im/000000000.png": None, "im/1.png": None,
    }  # fmt: skip


def test_a_table_in_a_folder_speaks_for_that_folder_and_below(tmp_path: Path) -> None:
    write_images(tmp_path / "im", ["1.png", "b/1.png", "b/deep/2.png", "c/7.png", "c/2.png"])
    lines(tmp_path / "im/m.jsonl", {"file_name": "1.png", "text": "root 1"},
          {"file_name": "b/1.png", "text": "root says b/1"})  # fmt: skip
    lines(tmp_path / "im/b/m.jsonl", {"file_name": "1.png", "text": "b 1"},
          {"file_name": "7.png", "text": "gone"}, {"file_name": "2.png", "text": "moved below"},
          {"file_name": "../c/2.png", "text": "by its path"})  # fmt: skip
    found = scan((str(tmp_path / "im"),), (TEXT,))
    assert told(found) == {
        "im/1.png": "root 1", "im/b/1.png": "b 1", "im/b/deep/2.png": "moved below",
        "im/c/7.png": None, "im/c/2.png": "by its path",
    }  # fmt: skip
    assert counts(found) == [(2, 0, 0), (3, 1, 0)]
    assert found.matches.summary()[1] == "m.jsonl: 4 rows, 3 used, 1 of no image: 7.png"


@pytest.mark.parametrize(
    ("row", "image"),
    [
        ({"file_name": "a.png"}, "a.png"),
        ({"file_name": "./x//c.png"}, "x/c.png"),
        ({"file_name": "x\\c.png"}, "x/c.png"),
        ({"file_name": "x/../a.png"}, "a.png"),
        ({"file_name": "C:\\Users\\me\\c.png"}, "x/c.png"),  # gone, and one image is called so
        ({"file_name": "elsewhere/c.png"}, "x/c.png"),
        ({"file_name": "c.jpg"}, None),  # never a stem
        ({"file_name": "gone.png", "id": 1}, None),
        ({"file_name": "gone.png", "key": "a"}, None),
        ({"file_name": "a.png", "id": "c"}, "a.png"),
        ({"file_name": "d.png"}, None),  # two are called so
        ({"file_name": "y/d.png", "key": "a"}, "y/d.png"),
        ({"file_name": "a"}, "a.png"),
        ({"key": "x/c"}, "x/c.png"),
        ({"key": "c"}, "x/c.png"),
        ({"key": "y/c"}, None),  # another folder's
        ({"key": "d"}, None),
        ({"key": "twin"}, None),  # twin.png and twin.webp
        ({"id": 1}, "1.png"),
        ({"id": 1, "url": "https://example.org/none"}, None),
        ({"id": 2, "key": "a"}, "a.png"),
        ({"image": {"path": "a.png"}}, "a.png"),
        ({"image": "https://example.org/a.png"}, None),
        ({}, None),
    ],
)
def test_a_row_speaks_for_what_it_names(
    tmp_path: Path, row: dict[str, Any], image: str | None
) -> None:
    names = ["a.png", "1.png", "x/c.png", "x/d.png", "y/d.png", "twin.png", "twin.webp"]
    write_images(tmp_path / "im", names, width=16, height=16)
    lines(tmp_path / "im/m.jsonl", {**row, "text": "it"})
    found = scan((str(tmp_path / "im"),), (TEXT,))
    assert {key for key, text in told(found).items() if text} == (
        {f"im/{image}"} if image else set()
    )


def test_a_file_that_is_there_and_no_image_of_ours_keeps_its_caption(tmp_path: Path) -> None:
    write_images(tmp_path / "im", ["x/a.png", "y/a.png"])
    write_images(tmp_path / "other", ["a.png"])
    lines(tmp_path / "im/m.jsonl", {"file_name": "x/a.png", "text": "excluded"})
    found = scan((str(tmp_path / "im"),), (TEXT,), (), ("x/a.png",))
    assert told(found) == {"im/y/a.png": None}
    lines(tmp_path / "im/m.jsonl", {"file_name": "../other/a.png", "text": "not scanned"})
    (tmp_path / "im/x/a.png").unlink()
    assert told(scan((str(tmp_path / "im"),), (TEXT,))) == {"im/y/a.png": None}


def test_rows_that_share_a_missing_files_name_caption_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "im", ["z/1.png", "z/2.png"])
    lines(tmp_path / "im/m.jsonl", {"file_name": "x/1.png", "text": "x"},
          {"file_name": "y/1.png", "text": "y"}, {"file_name": "z/2.png", "text": "z"},
          {"file_name": "x/2.png", "text": "not z's"})  # fmt: skip
    found = scan((str(tmp_path / "im"),), (TEXT,))
    assert told(found) == {"im/z/1.png": None, "im/z/2.png": "z"}
    assert counts(found) == [(1, 1, 2)]
    assert "2 match several images: x/1.png, y/1.png" in found.matches.summary()[0]


def test_a_table_elsewhere_speaks_for_all_sources_where_that_is_clear(tmp_path: Path) -> None:
    write_images(tmp_path / "A", ["1.png", "2.png", "3.png"])
    write_images(tmp_path / "B", ["1.png"])
    table = lines(tmp_path / "meta/t.jsonl", {"file_name": "1.png", "text": "whose?"},
                  {"file_name": "2.png", "text": "A's"}, {"key": "3", "text": "A's too"},
                  {"file_name": str(tmp_path / "B/1.png"), "text": "B's"})  # fmt: skip
    found = scan((str(tmp_path / "A"), str(tmp_path / "B"), str(table)), (TEXT,))
    assert told(found) == {
        "A/1.png": None, "A/2.png": "A's", "A/3.png": "A's too", "B/1.png": "B's"
    }  # fmt: skip
    assert counts(found) == [(3, 0, 1)]


def test_a_table_beside_images_says_nothing_of_other_sources(tmp_path: Path) -> None:
    write_images(tmp_path / "A", ["1.png"])
    write_images(tmp_path / "B", ["1.png", "2.png"])
    table = lines(tmp_path / "A/t.jsonl", {"file_name": "1.png", "text": "A's"},
                  {"file_name": "2.png", "text": "gone"}, {"key": "2", "text": "gone"})  # fmt: skip
    sources = (str(tmp_path / "A"), str(tmp_path / "B"))
    for more in ((), (str(table),)):
        assert told(scan((*sources, *more), (TEXT,))) == {
            "A/1.png": "A's", "B/1.png": None, "B/2.png": None
        }  # fmt: skip


def test_the_more_exact_row_counts_then_the_nearer_table_then_the_last(tmp_path: Path) -> None:
    write_images(tmp_path / "im", ["a/1.png", "a/2.png", "a/3.png"])
    lines(tmp_path / "im/z.jsonl", {"key": "1", "text": "less exact, and last"},
          {"file_name": "a/2.png", "text": "farther"})  # fmt: skip
    lines(tmp_path / "im/a/m.jsonl", {"file_name": "1.png", "text": "exact"},
          {"file_name": "2.png", "text": "nearer"}, {"file_name": "3.png", "text": "first"},
          {"file_name": "3.png", "text": "last"}, {"file_name": "3.png"})  # fmt: skip
    assert told(scan((str(tmp_path / "im"),), (TEXT,))) == {
        "im/a/1.png": "exact", "im/a/2.png": "nearer", "im/a/3.png": "last"
    }  # fmt: skip


@pytest.mark.parametrize("composed", [True, False])
def test_accents_match_however_they_are_composed(tmp_path: Path, composed: bool) -> None:
    forms = unicodedata.normalize("NFC", "é/Å.png"), unicodedata.normalize("NFD", "é/Å.png")
    name, written = forms if composed else forms[::-1]
    write_images(tmp_path / "im", [name, "e/A.png"])
    lines(tmp_path / "im/m.jsonl", {"file_name": written, "text": "it"})
    assert told(scan((str(tmp_path / "im"),), (TEXT,))) == {f"im/{name}": "it", "im/e/A.png": None}


def test_an_image_of_hugging_faces_is_read_with_bytes_or_by_its_path(tmp_path: Path) -> None:
    write_images(tmp_path / "im", ["a.png", "b.png"])
    inside = (tmp_path / "im/b.png").read_bytes()
    file = shard(tmp_path / "data/train-00000-of-00001.parquet", [None, inside, None, None],
                 [str(tmp_path / "im/a.png"), "b.png", "../im/b.png", None],
                 ["by path", "inside", "relative", "nothing"])  # fmt: skip
    for source in (file, file.parent):
        found = scan((str(source), str(tmp_path / "im")), ("parquet:text",))
        by_text = {text: key for key, text in told(found, "parquet:text").items()}
        sources = dict(zip(*(found.images[n].to_pylist() for n in ("key", "source")), strict=True))
        read = {text: read_source(sources[key]) for text, key in by_text.items() if text}
        first = (tmp_path / "im/a.png").read_bytes()
        assert read == {"by path": first, "inside": inside, "relative": inside}
        assert found.passed_over["rows without an image"] == 1


def test_a_column_of_bytes_that_are_all_null_names_files(tmp_path: Path) -> None:
    write_images(tmp_path / "im", ["a.png"])
    value = [{"bytes": None, "path": "a.png"}]  # pyarrow infers no type for these bytes
    for number, kind in enumerate((None, IMAGE)):
        table = pa.table({"image": pa.array(value, kind), "text": ["it"]})
        pq.write_table(table, tmp_path / f"im/{number}.parquet")
        found = scan((str(tmp_path / f"im/{number}.parquet"),), ("parquet:text",))
        assert told(found, "parquet:text") == {f"{number}.parquet/a.png": "it"}


@given(st.lists(st.sampled_from(["a.png", "x/a.png", "b.png", "x/b.png", "c", "x\\b.png"])))
def test_no_row_speaks_for_two_images_and_sums_are_right(names: list[str]) -> None:
    """Whatever is named how often: a row has one image or none, and one caption an image."""
    images = pa.table({
        "key": ["im/a.png", "im/x/a.png", "im/y/b.png", "im/c.png"],
        "source": ["/im/a.png", "/im/x/a.png", "/im/y/b.png", "/im/c.png"],
        "url": pa.nulls(4, pa.string()),
    })  # fmt: skip
    nothing = pa.nulls(len(names), pa.string())
    rows = {"path": pa.array(names, pa.string()), "key": nothing, "id": nothing, "url": nothing}
    texts = pa.array([f"{n}: {name}" for n, name in enumerate(names)], pa.string())
    table = Rows.make(Path("/im/m.jsonl"), rows, captions={TEXT: texts}, remarks=Counter())
    found = match([Table(table, "/im", "im")], images)
    captions = captions_of(found, images["key"].combine_chunks(), (TEXT,)).to_pylist()
    assert len({c["key"] for c in captions}) == len(captions)
    assert sum(found.counts(0)) == len(names)
    right = {"a.png": 0, "x/a.png": 1, "c": 3}
    for name, image in zip(names, found.image.tolist(), strict=True):
        missing = NO_IMAGE if name == "a.png" else 2  # the only b.png
        shared = sum("b.png" in other for other in names) > 1
        assert image == right.get(name, SEVERAL if shared else missing)


@given(st.text(st.sampled_from("ab/\\.é́"), max_size=8))
def test_canonical_paths_stay_as_they_are(name: str) -> None:
    once = canonical(pa.array([name], pa.string()))
    assert canonical(once) == once


def test_columns_of_another_kind_are_not_a_files(tmp_path: Path) -> None:
    file = lines(tmp_path / "m.jsonl", {"file_name": "a.png", "text": "it"})
    assert read_rows(file, (Column.parse("csv:text"), Column.parse(TEXT))).captions.keys() == {TEXT}
