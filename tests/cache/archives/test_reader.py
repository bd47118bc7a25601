import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import picture
from xlsd_cache.archives.members import ArchiveContents
from xlsd_cache.archives.reader import read_members
from xlsd_cache.errors import UserError
from xlsd_cache.files.inflate import BadSource
from xlsd_cache.files.uri import read_source
from xlsd_cache.sources.records import Search

CONTENT = {f"{i:03d}.jpg": picture(i, 20, 20).tobytes() for i in range(6)}
CONTENT |= {f"{i:03d}.txt": f"picture {i}".encode() for i in range(6)}


def write_tar(path: Path, layout: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=layout) as tar:
        for name, data in sorted(CONTENT.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path: Path, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in sorted(CONTENT.items()):
            file.writestr(name, data)


def read(path: Path) -> ArchiveContents:
    return read_members(path, Search(lambda n: n.endswith(".jpg"), frozenset(["txt"])))


def images(found: ArchiveContents) -> dict[str, bytes]:
    assert all(len(read_source(m.source)) == m.size for m in found.members)
    return {member.name: read_source(member.source) for member in found.members}


WRITERS: list[Callable[[Path], None]] = [
    write_tar,
    lambda path: write_tar(path, layout=tarfile.GNU_FORMAT),
    lambda path: write_tar(path, layout=tarfile.USTAR_FORMAT),
    write_zip,
    lambda path: write_zip(path, method=zipfile.ZIP_DEFLATED),
]


@pytest.mark.parametrize("kind", range(len(WRITERS)))
def test_members_are_what_the_library_that_wrote_them_holds(tmp_path: Path, kind: int) -> None:
    path = tmp_path / ("a.tar" if kind < 3 else "a.zip")
    WRITERS[kind](path)
    found = read(path)
    assert images(found) == {name: d for name, d in CONTENT.items() if name.endswith("jpg")}
    assert found.texts == {name: data for name, data in CONTENT.items() if name.endswith("txt")}
    assert (found.damage, found.passed_over, found.remarks) == ("", {}, [])


def test_long_and_foreign_names_links_and_folders(tmp_path: Path) -> None:
    long = "deep/" * 30 + "naïve 写真.jpg"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo(long)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"data"))
        for name, kind in (("hard.jpg", tarfile.LNKTYPE), ("soft.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, long
            tar.addfile(link)
    found = read(tmp_path / "a.tar")
    assert images(found) == {long: b"data", "hard.jpg": b"data"}
    assert found.passed_over == {"other files": 1}  # the soft link


@pytest.mark.parametrize("cut", [700, 1024, 1500, 5000, 9000, -1024 * 9, -10240, -9000])
def test_a_cut_tar_gives_what_is_whole_and_says_so(tmp_path: Path, cut: int) -> None:
    write_tar(tmp_path / "whole.tar")
    whole = images(read(tmp_path / "whole.tar"))
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:cut])
    found = read(tmp_path / "a.tar")
    kept = len(content[:cut])
    intact = {name: data for name, data in whole.items() if content.index(data) + len(data) <= kept}
    for member in found.members:
        if member.name in intact:
            assert read_source(member.source) == intact.pop(member.name)
        else:
            assert member.reason == "truncated"
            with pytest.raises(BadSource) as raised:
                read_source(member.source)
            assert raised.value.reason == "truncated"
    assert not intact
    end = max(content.index(data) + len(data) for data in CONTENT.values())
    assert bool(found.damage) == (kept < end + 1024)


def test_a_damaged_header_is_said_and_what_is_before_it_is_kept(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    at = content.index(b"003.jpg")
    content[at : at + 200] = b"\xff" * 200
    (tmp_path / "a.tar").write_bytes(content)
    found = read(tmp_path / "a.tar")
    assert sorted(images(found)) == ["000.jpg", "001.jpg", "002.jpg"]
    assert f"at byte {at} there is neither a member nor the end mark" in found.damage


def test_zips_that_cannot_be_read_in_place_are_said(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", method=zipfile.ZIP_BZIP2)
    found = read(tmp_path / "a.zip")
    assert {(m.reason, m.detail) for m in found.members} == {
        ("unsupported", "compressed by method 12 of zip, which is not read")
    }
    assert set(found.texts.values()) == {"compressed otherwise than by deflate"}
    assert "12 of 12 members are compressed otherwise than by deflate" in found.remarks[0]


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_what_is_no_archive_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no archive" * 200)
    with pytest.raises(UserError, match=rf"cannot read .*{name}: .*leave it out"):
        read(tmp_path / name)
