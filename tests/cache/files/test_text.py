"""Text files in every encoding that editors and shells write; one error for any other."""

import codecs
from pathlib import Path

import pytest

from xlsd_cache.errors import UserError
from xlsd_cache.files.text import read_lines, read_text

TEXT = "# é\nphase = 'unet'\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode(),
        codecs.BOM_UTF16_LE + TEXT.replace("\n", "\r\n").encode("utf-16-le"),
        TEXT.replace("\n", "\r").encode(),
    ],
)
def test_the_text_is_the_same(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t").write_bytes(data)
    assert read_text(tmp_path / "t", "the recipe") == TEXT
    assert read_lines(tmp_path / "t", "the recipe") == ["# é", "phase = 'unet'"]


@pytest.mark.parametrize(
    ("data", "line", "encoding"),
    [
        (b"a\nb\xe9\n", 2, "UTF-8"),
        (b"a\x00\nb", 1, "UTF-8"),
        ("ab\ncd".encode("utf-16-le"), 1, "UTF-8"),  # without its mark
        (codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"\x00", 2, "UTF-16"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8a\x00", 1, "UTF-16"),
        (b"\x89PNG\r\n\x1a\n", 1, "UTF-8"),
    ],
)
def test_other_bytes_are_refused_with_their_place(
    tmp_path: Path, data: bytes, line: int, encoding: str
) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(UserError, match=f"the list .*t, line {line}: not valid {encoding}; save"):
        read_text(tmp_path / "t", "the list")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", tmp_path / ("n" * 300), Path("a\0b")):
        with pytest.raises(UserError, match="cannot read the list "):
            read_text(path, "the list")
    (tmp_path / "zero").symlink_to("/dev/zero")
    if Path("/dev/zero").exists():
        with pytest.raises(UserError, match="larger than 64 MiB"):
            read_text(tmp_path / "zero", "the list")
