import gzip
import json
import os
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import write_images
from xlsd_cache.errors import UserError
from xlsd_cache.files.uri import read_source, stat_source
from xlsd_cache.sources.scan import Scan, scan


def found(source: Path, *columns: str, allow_outside: bool = False) -> Scan:
    return scan((str(source),), columns or ("txt",), allow_outside=allow_outside)


def keys(scanned: Scan) -> list[str]:
    names: list[str] = scanned.images["key"].to_pylist()
    return names


def texts(scanned: Scan) -> dict[str, dict[str, str]]:
    """key -> column -> text."""
    said: dict[str, dict[str, str]] = {key: {} for key in keys(scanned)}
    for row in scanned.captions.to_pylist():
        said[row["key"]][row["column"]] = row["text"]
    return said


def test_every_image_is_found_once_whatever_the_folders_are_like(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_images(root, ["a.png", "deep/er/B.JPG", "two.dots.webp", "-dash.png", "naïve 写真.png"])
    write_images(root / "x.jpg", ["inside.png"])
    write_images(tmp_path / "elsewhere", ["linked.png"])
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "broken.png").symlink_to(tmp_path / "nothing")
    write_images(root, [".hidden.png", ".folder/c.png", "notes.md.png"])
    (root / "notes.md").write_text("no image")
    (root / "Thumbs.db").write_bytes(b"\0")
    result = found(root)
    assert keys(result) == sorted(
        f"in/{name}"
        for name in (
            "-dash.png", "a.png", "deep/er/B.JPG", "link/linked.png", "naïve 写真.png",
            "notes.md.png", "two.dots.webp", "x.jpg/inside.png",
        )
    )  # fmt: skip
    assert result.passed_over == {
        "other files": 2, "broken links": 1, "folders linked again": 1, "hidden": 3
    }  # fmt: skip
    for image in result.images.to_pylist():
        assert read_source(image["source"]) == Path(image["source"]).read_bytes()
        assert stat_source(image["source"])[:2] == (image["size"], image["mtime_ns"])
        assert texts(result)[image["key"]]["txt"].startswith("picture")


def test_keys_do_not_depend_on_where_the_source_folder_is(tmp_path: Path) -> None:
    write_images(tmp_path / "here" / "photos", ["a/b.png"])
    before = found(tmp_path / "here" / "photos")
    (tmp_path / "here").rename(tmp_path / "there")
    after = found(tmp_path / "there" / "photos")
    assert keys(before) == ["photos/a/b.png"]
    assert keys(after) == ["photos/a/b.png"]


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        write_images(tmp_path / parent / "images", ["a.png"])
    result = scan((str(tmp_path / "one/images"), str(tmp_path / "two/images")), ())
    assert keys(result) == ["images/a.png", "images~2/a.png"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain", "plain"),
        ("naïve 写真".encode(), "naïve 写真"),
        ("\ufeffbom".encode(), "bom"),
        ("utf-16 é".encode("utf-16"), "utf-16 é"),
        ("latin-1 é".encode("latin-1"), "latin-1 é"),
        (b"one\r\ntwo\r\n\r\n  three  ", "one\ntwo\nthree"),
        (b"n\0ul", "nul"),
        (b" \n\t\n", None),
        (b"", None),
    ],
)
def test_captions_in_every_encoding(tmp_path: Path, data: bytes, text: str | None) -> None:
    write_images(tmp_path / "in", ["a.png"])
    (tmp_path / "in" / "a.txt").write_bytes(data)
    assert texts(found(tmp_path / "in"))["in/a.png"].get("txt") == text


def test_several_caption_columns(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "in" / "a.moon").write_text("a sentence")
    assert texts(found(tmp_path / "in", "txt", "moon", "tags")) == {
        "in/a.png": {"txt": "picture 0", "moon": "a sentence"},
        "in/b.png": {"txt": "picture 1"},
    }


def test_what_cannot_be_scanned_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such file or directory"):
        found(tmp_path / "gone")
    (tmp_path / "file.png").write_bytes(b"x")
    with pytest.raises(
        UserError,
        match=r"file\.png is no source of images; give a folder, or",
    ):
        found(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in .*empty"):
        found(tmp_path / "empty")
    write_images(tmp_path / "in", ["a.png"])
    with pytest.raises(UserError, match="given twice"):
        scan((str(tmp_path / "in"), str(tmp_path / "in/../in")), ())


def test_an_unreadable_folder_is_refused_by_name() -> None:
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which nobody else may enter
        folder = Path(name)
        write_images(folder / "in", ["a.png", "locked/b.png"])
        folder.chmod(0o755)
        (folder / "in" / "locked").chmod(0)
        root = os.geteuid() == 0
        if root:  # root may read everything, so be somebody else for a moment
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match="cannot read the folder .*locked: Permission"):
                found(folder / "in")
        finally:
            if root:
                os.seteuid(0)
            (folder / "in" / "locked").chmod(0o755)


def write_tree(folder: Path) -> None:
    """Six images as img2dataset leaves them in its `files` layout."""
    for part in range(2):
        rows = []
        for i in range(3):
            key = f"{part:05d}{i:04d}"
            write_images(folder / f"{part:05d}", [f"{key}.jpg"], first_seed=10 * part + i)
            url = f"https://example.org/{part}/{i}"
            rows.append({"key": key, "url": url, "caption": f"row {key}", "status": "success"})
            about = json.dumps({"key": key, "url": url, "caption": f"json {key}", "exif": "{}"})
            (folder / f"{part:05d}" / f"{key}.json").write_text(about)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part:05d}.parquet")
        (folder / f"{part:05d}_stats.json").write_text("{}")


def test_an_img2dataset_tree_with_captions_from_everywhere(tmp_path: Path) -> None:
    write_tree(tmp_path / "cc")
    columns = ("txt", "json:caption", "parquet:caption")
    result = found(tmp_path / "cc", *columns)
    assert keys(result) == [f"cc/{p:05d}/{p:05d}{i:04d}.jpg" for p in range(2) for i in range(3)]
    assert result.passed_over == {}
    assert texts(result)["cc/00001/000010002.jpg"] == {
        "txt": "picture 12", "json:caption": "json 000010002", "parquet:caption": "row 000010002"
    }  # fmt: skip
    assert all(len(said) == 3 for said in texts(result).values())
    plain = found(tmp_path / "cc", "txt")
    assert plain.passed_over == {"other files": 10}  # 6 .json, 2 .parquet, 2 _stats.json


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jgz"])
@pytest.mark.parametrize("identity", ["key", "url"])
def test_json_lines_join_the_images_of_a_tree_by_key_or_url(
    tmp_path: Path, suffix: str, identity: str
) -> None:
    write_tree(tmp_path / "cc")
    lines = []
    for part in range(2):
        for i in range(3):
            value = {"key": f"{part:05d}{i:04d}", "url": f"https://example.org/{part}/{i}"}[
                identity
            ]
            lines.append(json.dumps({identity: value, "wd": ["a tag", f"tag {part}{i}"]}))
    lines.append(json.dumps({identity: "another image", "wd": ["no tag"]}))
    write_lines(tmp_path / f"wd{suffix}", lines)
    sources = (str(tmp_path / "cc"), str(tmp_path / f"wd{suffix}"))
    result = scan(sources, ("jsonl:wd",))
    assert len(keys(result)) == 6
    assert texts(result)["cc/00001/000010002.jpg"] == {"jsonl:wd": "a tag, tag 12"}
    with pytest.raises(UserError, match="name no image file that exists"):
        scan(sources[1:], ("jsonl:wd",))


def write_lines(path: Path, lines: list[str]) -> None:
    data = "\n".join(lines).encode()
    path.write_bytes(data if path.suffix == ".jsonl" else gzip.compress(data))


@pytest.mark.parametrize("field", ["file_name", "image", "path", "image_path", "img", "filename"])
def test_json_lines_of_image_paths(tmp_path: Path, field: str) -> None:
    write_images(tmp_path / "data" / "images", ["a.png", "b.png", "not named.png"])
    write_images(tmp_path / "elsewhere", ["c.png"])
    paths = ["images/a.png", "./images/b.png", str(tmp_path / "elsewhere" / "c.png"), "images/gone"]
    rows = [{field: path, "text": f"about {i}", "id": i} for i, path in enumerate(paths)]
    lines = [json.dumps(row) for row in rows] + ["", "{broken", "[1]"]
    write_lines(tmp_path / "data" / "list.jsonl", lines)
    result = found(tmp_path / "data" / "list.jsonl", "jsonl:text", "txt", allow_outside=True)
    outside = str(tmp_path / "elsewhere" / "c.png").lstrip("/")
    assert texts(result) == {
        "list.jsonl/images/a.png": {"jsonl:text": "about 0", "txt": "picture 0"},
        "list.jsonl/images/b.png": {"jsonl:text": "about 1", "txt": "picture 1"},
        f"list.jsonl/{outside}": {"jsonl:text": "about 2", "txt": "picture 0"},
    }
    assert result.passed_over == {"named but not there": 1}
    (damage,) = result.damaged
    assert "2 lines are no JSON objects, the first is 6" in damage


def test_a_cut_gzip_gives_its_whole_lines_and_says_so(tmp_path: Path) -> None:
    write_images(tmp_path / "in", [f"{i}.png" for i in range(9)])
    rows = [json.dumps({"image": f"{i}.png", "text": os.urandom(999).hex()}) for i in range(9)]
    write_lines(tmp_path / "in" / "all.jgz", rows)
    whole = (tmp_path / "in" / "all.jgz").read_bytes()
    (tmp_path / "in" / "all.jgz").write_bytes(whole[: len(whole) // 2])
    result = found(tmp_path / "in" / "all.jgz", "jsonl:text")
    assert 0 < len(keys(result)) < 9
    assert "the gzip stream ends after" in result.damaged[0]


def test_a_json_lines_file_in_a_folder_serves_its_images(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "train", ["a.png", "b.png"])
    rows = [json.dumps({"file_name": f"{x}.png", "text": f"about {x}"}) for x in "ab"]
    write_lines(tmp_path / "in" / "train" / "metadata.jsonl", rows)
    assert texts(found(tmp_path / "in", "jsonl:text"))["in/train/b.png"] == {
        "jsonl:text": "about b"
    }
    both = (str(tmp_path / "in"), str(tmp_path / "in" / "train" / "metadata.jsonl"))
    result = scan(both, ("txt",))
    assert keys(result) == ["in/train/a.png", "in/train/b.png"]  # each file once
    assert result.passed_over == {"named twice": 2, "other files": 1}


@pytest.mark.parametrize("how", ["paths", "bytes", "struct"])
def test_parquet_of_image_paths_or_images(tmp_path: Path, how: str) -> None:
    names = [f"{i}.png" for i in range(5)]
    write_images(tmp_path / "data", names)
    data = [(tmp_path / "data" / name).read_bytes() for name in names]
    columns = {
        "paths": {"file_name": pa.array(names)},
        "bytes": {"image": pa.array([*data[:4], None]), "key": pa.array(names)},
        "struct": {"image": pa.array([{"bytes": d, "path": None} for d in data])},
    }[how]
    captions = pa.array([{"en": f"about {i}"} for i in range(5)])
    table = pa.table({**columns, "text": captions, "tags": pa.array([["x", "y"]] * 5)})
    pq.write_table(table, tmp_path / "data" / "t.parquet", row_group_size=2)
    result = found(tmp_path / "data" / "t.parquet", "parquet:text.en", "parquet:tags")
    expected = names if how != "struct" else [f"{i:09d}" for i in range(5)]
    expected = expected[:4] if how == "bytes" else expected
    assert keys(result) == [f"t.parquet/{name}" for name in expected]
    for i, image in enumerate(result.images.to_pylist()):
        assert read_source(image["source"]) == data[i]
        assert stat_source(image["source"])[:2] == (image["size"], image["mtime_ns"])
        said = texts(result)[image["key"]]
        assert said == {"parquet:text.en": f"about {i}", "parquet:tags": "x, y"}


def pack(folder: Path, archive: Path) -> None:
    """The folder's files in a tar or zip."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".tar":
        with tarfile.open(archive, "w") as tar:
            for path in paths:
                tar.add(path, path.relative_to(folder).as_posix())
    else:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in paths:
                file.write(path, path.relative_to(folder).as_posix())


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_archives_hold_the_same_as_the_folders_they_were_made_of(
    tmp_path: Path, suffix: str
) -> None:
    write_tree(tmp_path / "cc")
    pack(tmp_path / "cc", tmp_path / f"cc{suffix}")
    columns = ("txt", "json:caption")
    folder, archive = found(tmp_path / "cc", *columns), found(tmp_path / f"cc{suffix}", *columns)
    assert archive.passed_over == {"other files": 2}  # .parquet
    assert [key.replace(f"cc{suffix}/", "cc/") for key in keys(archive)] == keys(folder)
    assert list(texts(archive).values()) == list(texts(folder).values())
    pairs = zip(
        folder.images["source"].to_pylist(), archive.images["source"].to_pylist(), strict=True
    )
    assert all(read_source(ours) == read_source(theirs) for ours, theirs in pairs)


def test_a_folder_of_webdataset_tars_is_read_in_place(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    (tmp_path / "wds").mkdir()
    for part in ("00000", "00001"):
        pack(tmp_path / "tree" / part, tmp_path / "wds" / f"{part}.tar")
        (tmp_path / "tree" / f"{part}.parquet").rename(tmp_path / "wds" / f"{part}.parquet")
    write_lines(
        tmp_path / "by_url.jsonl", [json.dumps({"url": "https://example.org/1/2", "x": "far"})]
    )
    columns = ("json:caption", "parquet:caption", "jsonl:x")
    result = scan((str(tmp_path / "wds"), str(tmp_path / "by_url.jsonl")), columns)
    assert keys(result)[5] == "wds/00001.tar/000010002.jpg"
    assert texts(result)["wds/00001.tar/000010002.jpg"] == {
        "json:caption": "json 000010002", "parquet:caption": "row 000010002", "jsonl:x": "far"
    }  # fmt: skip


def test_a_damaged_tar_is_said_and_the_rest_of_the_folder_used(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    (tmp_path / "wds").mkdir()
    for part in ("00000", "00001"):
        pack(tmp_path / "tree" / part, tmp_path / "wds" / f"{part}.tar")
    content = (tmp_path / "wds" / "00000.tar").read_bytes()
    (tmp_path / "wds" / "00000.tar").write_bytes(content[: len(content) // 2])
    result = found(tmp_path / "wds")
    assert 3 < len(keys(result)) < 6
    assert "00000.tar is damaged" in result.damaged[0]


def test_a_hash_tree_of_links_is_every_name_once(tmp_path: Path) -> None:
    write_images(tmp_path / "objects", ["ab/cd.png", "ef/01.png"])
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "soft.png").symlink_to(tmp_path / "objects" / "ab" / "cd.png")
    os.link(tmp_path / "objects" / "ab" / "cd.png", tmp_path / "names" / "hard.png")
    result = scan((str(tmp_path / "objects"), str(tmp_path / "names")), ())
    assert keys(result) == [
        "names/hard.png", "names/soft.png", "objects/ab/cd.png", "objects/ef/01.png"
    ]  # fmt: skip


def test_lists_include_and_exclude(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png", "b.png", "x/c.png", "x/d.png"])
    only, exclude, wrong = (str(tmp_path / f"{x}.txt") for x in ("only", "exclude", "wrong"))
    Path(only).write_text("\ufeffin/a.png\r\nx/c.png\n\nin/x/d.png\nin/none.png\n")
    Path(exclude).write_text(f"{tmp_path}/in/x/d.png\n")
    source = str(tmp_path / "in")
    kept = scan((source,), ("txt",), (only,), (exclude,))
    assert keys(kept) == ["in/a.png", "in/x/c.png"]
    assert list(texts(kept)) == keys(kept)
    assert len(keys(scan((source,), (), (), (only,)))) == 1
    Path(wrong).write_text("nothing.png\n")
    with pytest.raises(UserError, match="no line of .*wrong.txt matches an image"):
        scan((source,), (), (wrong,))
    with pytest.raises(UserError, match="--only and --exclude leave no image"):
        scan((source,), (), (only,), (only,))
    with pytest.raises(UserError, match="gone.txt is no file, and no name that matches an image"):
        scan((source,), (), (str(tmp_path / "gone.txt"),))


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("*_b.*", ["a[1].png", "sub/c.png"]),
        ("sub/*", ["a1_b.png", "a[1].png"]),
        ("sub/", ["a1_b.png", "a[1].png"]),
        ("in/s?b/[a-d].png", ["a1_b.png", "a[1].png"]),
        ("[!a]*.png", ["a1_b.png", "a[1].png"]),
        ("a[1].png", ["a1_b.png", "sub/c.png"]),  # a name before it is a pattern
        ("sub\\c.png", ["a1_b.png", "a[1].png"]),
    ],
)
def test_patterns_exclude_and_include(tmp_path: Path, pattern: str, left: list[str]) -> None:
    names = ["a1_b.png", "a[1].png", "sub/c.png"]
    write_images(tmp_path / "in", names)
    (tmp_path / "list").write_text(pattern)
    source = (str(tmp_path / "in"),)
    for given in (pattern, str(tmp_path / "list")):
        assert keys(scan(source, (), (), (given,))) == [f"in/{name}" for name in left]
        assert keys(scan(source, (), (given,))) == [f"in/{n}" for n in names if n not in left]


def test_captions_are_counted_by_what_is_wrong_with_them(tmp_path: Path) -> None:
    write_images(tmp_path / "in", [f"{x}.png" for x in "abcd"])
    (tmp_path / "in" / "a.txt").write_bytes(b"\xe9t\xe9\0")
    (tmp_path / "in" / "b.txt").unlink()
    (tmp_path / "in" / "c.txt").write_text(" \n")
    result = found(tmp_path / "in")
    assert result.remarks == {
        ("txt", "missing"): 1, ("txt", "empty or blank"): 1,
        ("txt", "not UTF-8, read as Latin-1"): 1, ("txt", "with NUL removed"): 1,
    }  # fmt: skip


def test_links_that_lead_nowhere_or_back_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png"])
    (tmp_path / "in" / "round.png").symlink_to("round.png")
    (tmp_path / "in" / "gone").symlink_to("nothing")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    assert found(tmp_path / "in").passed_over == {"broken links": 2, "other files": 1}
