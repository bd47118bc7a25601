import os
import tempfile
from pathlib import Path

import pytest

from tests.support import write_images
from xlsd_cache import UserError
from xlsd_cache.locate import read_source, stat_source
from xlsd_cache.sources import Scan, scan


def found(source: Path, *columns: str) -> Scan:
    return scan((str(source),), columns or ("txt",))


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
    assert result.passed_over == {"other files": 2, "broken links": 1, "folders linked again": 1}
    for image in result.images.to_pylist():
        assert read_source(image["source"]) == Path(image["source"]).read_bytes()
        assert stat_source(image["source"]) == (image["size"], image["mtime_ns"])
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
    with pytest.raises(UserError, match="no folder or file .*gone"):
        found(tmp_path / "gone")
    (tmp_path / "file.png").write_bytes(b"x")
    with pytest.raises(
        UserError,
        match=r"file\.png is no source of images; name a folder, or",
    ):
        found(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in .*empty"):
        found(tmp_path / "empty")
    write_images(tmp_path / "in", ["a.png"])
    with pytest.raises(UserError, match="named twice"):
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
