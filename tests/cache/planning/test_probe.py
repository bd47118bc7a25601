import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support import write_images
from xlsd_cache.planning import probe
from xlsd_cache.planning.probe import HEADERS, read_hashes, read_headers
from xlsd_cache.sources.scan import scan


@pytest.fixture
def files(tmp_path: Path) -> pa.Table:
    write_images(tmp_path / "in", [f"{i:03d}.png" for i in range(200)], width=20, height=10)
    (tmp_path / "in" / "000.png").write_bytes(b"no image")
    return scan((str(tmp_path / "in"),), ()).images


def test_headers_are_in_the_files_order(files: pa.Table) -> None:
    found = read_headers(files, None, 4)
    assert found.schema == HEADERS
    rows = found.to_pylist()
    assert (rows[0]["width"], rows[0]["reason"]) == (0, "not_an_image")
    assert {(row["width"], row["height"], row["reason"]) for row in rows[1:]} == {(20, 10, "")}
    assert len({row["head"] for row in rows}) == 200


@pytest.mark.parametrize("torn", ["", '["in/', '{"a": 1}\n["in/', "\0\n"])
def test_a_killed_reading_goes_on_where_it_was(
    files: pa.Table,
    tmp_path: Path,
    opened: list[str],
    torn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "_LINES", 64)
    journal = tmp_path / "journal"
    whole = read_headers(files, journal, 2)
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == len(opened) == 200
    journal.write_text("".join(lines[:150]) + torn)
    opened.clear()
    assert read_headers(files, journal, 2).equals(whole)
    assert len(opened) == (50 if not torn.startswith("{") else 200)
    opened.clear()
    assert read_headers(files, journal, 2).equals(whole)
    assert not opened


def test_a_file_that_changed_since_is_read_again(
    files: pa.Table, tmp_path: Path, opened: list[str]
) -> None:
    journal = tmp_path / "journal"
    read_headers(files, journal, 2)
    write_images(tmp_path / "in", ["007.png"], first_seed=500, width=30, height=20)
    again = scan((str(tmp_path / "in"),), ()).images
    opened.clear()
    assert read_headers(again, journal, 2)["width"].to_pylist()[7] == 30
    assert opened == [str(tmp_path / "in" / "007.png")]


def test_a_file_that_another_replaced_is_read_again(
    files: pa.Table, tmp_path: Path, opened: list[str]
) -> None:
    """Of the same size and mtime: killed reading, swapped, gone on with."""
    images, journal = tmp_path / "in", tmp_path / "journal"
    for name in ("008.png", "009.png"):
        (images / name).write_bytes((images / "007.png").read_bytes()[:-1] + name[2:3].encode())
        os.utime(images / name, ns=(1, 1))
    before = scan((str(images),), ()).images
    first = read_hashes(before, journal, 2).to_pylist()
    for name, other in (("008.png", "x"), ("009.png", "008.png"), ("x", "009.png")):
        (images / name).rename(images / other)
    opened.clear()
    second = read_hashes(scan((str(images),), ()).images, journal, 2).to_pylist()
    assert sorted(opened) == [str(images / "008.png"), str(images / "009.png")]
    assert second[8:10] == first[9:7:-1]


def test_what_was_the_moments_fault_is_not_remembered(
    files: pa.Table, tmp_path: Path, opened: list[str]
) -> None:
    journal = tmp_path / "journal"
    (tmp_path / "in" / "003.png").rename(tmp_path / "away.png")
    assert read_headers(files, journal, 2)["reason"].to_pylist()[3] == "vanished"
    assert read_hashes(files, tmp_path / "hashes", 2)[3].as_py() == ""
    (tmp_path / "away.png").rename(tmp_path / "in" / "003.png")
    opened.clear()
    assert read_headers(files, journal, 2)["reason"].to_pylist()[3] == ""
    assert read_hashes(files, tmp_path / "hashes", 2)[3].as_py() != ""
    assert opened == [str(tmp_path / "in" / "003.png")] * 2
    assert all(json.loads(line) for line in journal.read_text().splitlines())
