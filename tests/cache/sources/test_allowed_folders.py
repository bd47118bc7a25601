"""Table rows may refer to files in the table's folder and the sources; others must be allowed."""

import json
import os
from pathlib import Path

import pytest

from tests.support import cache, write_images
from xlsd_cache.errors import UserError
from xlsd_cache.sources.scan import Scan, scan


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with one image, and a private folder next to it."""
    write_images(tmp_path / "data", ["a.png"])
    write_images(tmp_path / "private", ["p.png"], first_seed=5)
    return tmp_path / "data"


def table(folder: Path, *names: str) -> Path:
    file = folder / "m.jsonl"
    file.write_text("".join(json.dumps({"file_name": name, "text": "t"}) + "\n" for name in names))
    return file


def names(found: Scan) -> list[str]:
    return [Path(source).name for source in found.images["source"].to_pylist()]


@pytest.mark.parametrize("how", ["relative", "absolute", "backslashes", "link", "linked folder"])
def test_a_row_that_names_a_file_elsewhere_is_refused_and_said(data: Path, how: str) -> None:
    private = data.parent / "private" / "p.png"
    (data / "l.png").symlink_to(private)
    (data / "sub").symlink_to(private.parent)
    named = {"relative": "../private/p.png", "absolute": str(private), "link": "l.png",
             "backslashes": r"..\private\p.png", "linked folder": "sub/p.png"}[how]  # fmt: skip
    found = scan((str(table(data, named, "a.png")),), ("jsonl:text", "txt"))
    assert names(found) == ["a.png"]
    (told,) = found.damaged
    assert "1 rows name files outside its folder" in told
    assert named in told
    assert "--allow-outside" in told
    assert found.notes == []


def test_the_folder_named_as_a_source_lets_rows_name_its_files(data: Path) -> None:
    file = table(data, "../private/p.png", str(data / "a.png"))
    found = scan((str(file), str(data.parent / "private")), ("txt",))
    assert sorted(names(found)) == ["a.png", "p.png"]
    assert found.damaged == []
    (told,) = found.notes
    assert "1 rows name files outside" in told


def test_allow_outside_reads_them_and_says_so(data: Path) -> None:
    found = scan((str(table(data, "../private/p.png")),), ("txt",), allow_outside=True)
    assert names(found) == ["p.png"]
    assert found.captions["text"].to_pylist() == ["picture 5"]
    assert str(data.parent / "private") in found.notes[0]


def test_nothing_but_rows_to_elsewhere_is_one_sentence(
    data: Path, vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = table(data, "../private/p.png")
    assert cache("build", file, "--out", data.parent / "out", "--vae", vae) == 1
    assert "outside its folder" in capsys.readouterr().err
    assert not (data.parent / "out").exists()


def test_a_caption_that_is_a_link_to_elsewhere_is_left_out_and_said(data: Path) -> None:
    (data / "a.txt").unlink()
    (data / "a.txt").symlink_to(data.parent / "private" / "p.txt")
    file = table(data, "a.png")
    found = scan((str(file),), ("txt",))
    assert found.captions.num_rows == 0
    assert "1 captions are links to outside" in found.damaged[0]
    assert scan((str(file),), ("txt",), allow_outside=True).captions.num_rows == 1


def test_a_table_of_links_as_the_hubs_cache_has_them_is_read(tmp_path: Path) -> None:
    """Both the table and its images are links to one folder of blobs."""
    write_images(tmp_path / "blobs", ["0123.png"])
    table(tmp_path / "blobs", "a.png").rename(tmp_path / "blobs" / "4567")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to("../../blobs/0123.png")
    (snapshot / "m.jsonl").symlink_to("../../blobs/4567")
    found = scan((str(snapshot / "m.jsonl"),), ("jsonl:text",))
    assert names(found) == ["a.png"]
    assert found.damaged == []


def test_links_that_lead_out_of_a_folder_are_followed_and_said(data: Path) -> None:
    (data / "sub").symlink_to(data.parent / "private")
    (data / "b.png").symlink_to(data / "a.png")
    found = scan((str(data),), ("txt",))
    assert "p.png" in names(found)
    (told,) = found.notes
    assert "1 links lead outside" in told
    assert str(data / "sub") in told


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet", "m.tar", "m.zip", "m.csv"])
def test_a_pipe_as_a_source_is_one_sentence(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="a pipe"):
        scan((str(tmp_path / name),), ())


def test_pipes_beside_images_and_behind_names_are_passed_over(data: Path) -> None:
    for name in ("a.json", "b.png", "b.txt", "config.json", "m.parquet", "state.json"):
        os.mkfifo(data / name)
    (data / "a.txt").unlink()
    os.mkfifo(data / "a.txt")
    (data / "latents.zarr").mkdir()
    os.mkfifo(data / "latents.zarr" / "zarr.json")
    for source in (table(data, "a.png", "b.png"), data):
        found = scan((str(source),), ("txt", "json:caption", "jsonl:text"))
        assert names(found) == ["a.png"]
        assert set(found.captions["column"].to_pylist()) == {"jsonl:text"}


def test_json_nested_deep_costs_its_own_row_or_file(data: Path) -> None:
    deep = "[" * 100_000
    (data / "a.json").write_text('{"caption": ' + deep)
    (data / "config.json").write_text(deep)
    (data / "other.json").write_text(deep)
    file = table(data, "a.png")
    file.write_text(f'{{"file_name": "a.png", "x": {deep}\n' + file.read_text())
    for source in (file, data):
        found = scan((str(source),), ("json:caption", "jsonl:text"))
        assert names(found) == ["a.png"]
        assert found.captions["text"].to_pylist() == ["t"]
