"""Damaged and hostile archives, and duplicate member names: only what is really there is used."""

import gzip
import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support import cache, picture, printed, sums, write_images
from xlsd_cache.archives import reader as archives
from xlsd_cache.archives.members import ArchiveContents
from xlsd_cache.archives.reader import read_members
from xlsd_cache.errors import UserError
from xlsd_cache.files import uri as locate
from xlsd_cache.files.captions import DAMAGED, TOO_LARGE, NotRead
from xlsd_cache.files.inflate import BadSource
from xlsd_cache.files.uri import cell, open_source, read_source
from xlsd_cache.sources.records import Search, Tally, archive_records, folder_records
from xlsd_cache.store.reader import LatentStore

Files = list[tuple[str, bytes]]
SEARCH = Search(lambda name: name.endswith(".jpg"), frozenset(["txt"]))
ONE: Files = [("a.jpg", picture(1).tobytes()[:700]), ("a.txt", b"of a")]
TWO: Files = [("b.jpg", picture(2).tobytes()[:900]), ("b.txt", b"of b")]
BLOCK = tarfile.BLOCKSIZE


def tar_of(files: Files, layout: int = tarfile.PAX_FORMAT) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=layout) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def zip_of(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as file:
        for name, data in files:
            file.writestr(name, data)
    return made.getvalue()


MAKERS: dict[str, Callable[[Files], bytes]] = {
    "a.tar": tar_of,
    "a.tar.gz": lambda files: gzip.compress(tar_of(files)),
    "a.zip": zip_of,
}
KINDS = pytest.mark.parametrize("kind", MAKERS)


def read(path: Path, data: bytes | None = None) -> ArchiveContents:
    if data is not None:
        path.write_bytes(data)
    return read_members(path, SEARCH)


def images(found: ArchiveContents) -> dict[str, bytes | str]:
    """Content of each image, or the reason why it has none."""
    return {m.name: m.reason or content(m.source) for m in found.members}


def content(source: str) -> bytes | str:
    try:
        return read_source(source, 2**20)
    except BadSource as error:
        return error.reason


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that claims any size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = bytes([0x80 if size >= 0 else 0xFF]) + (size % 2**88).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@KINDS
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_last_member_of_a_name_counts(tmp_path: Path, kind: str) -> None:
    again: Files = [("./a.txt", b"new"), ("./a.jpg", b"later")]
    found = read(tmp_path / kind, MAKERS[kind](ONE + TWO + again))
    assert images(found) == {"a.jpg": b"later", "b.jpg": TWO[0][1]}
    assert found.texts == {"a.txt": b"new", "b.txt": b"of b"}
    assert found.remarks == ["2 members occur more than once; the last counts: a.txt, a.jpg"]


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_later_folder_or_link_takes_the_place_of_a_file(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [*ONE, *TWO]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name in ("a.jpg", "a.txt"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, name.replace("a", "b")
            tar.addfile(info)
    found = read(tmp_path / "a.tar")
    expected: dict[str, bytes | str] = {"b.jpg": TWO[0][1]}
    texts = {"b.txt": b"of b"}
    if kind == tarfile.LNKTYPE:  # to what the name meant then
        expected["a.jpg"], texts["a.txt"] = TWO[0][1], b"of b"
    assert (images(found), found.texts) == (expected, texts)
    assert "2 members occur more than once" in found.remarks[0]


def test_a_hard_link_keeps_what_its_name_led_to_then(tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in (("a.jpg", b"old"), ("hard.jpg", None), ("a.jpg", b"newer")):
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.LNKTYPE, "a.jpg"
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    for name, data in (("a.tar", made.getvalue()), ("a.tgz", gzip.compress(made.getvalue()))):
        assert images(read(tmp_path / name, data)) == {"a.jpg": b"newer", "hard.jpg": b"old"}


@pytest.mark.parametrize("zeros", [0, 2, 20, 3000])
def test_concatenated_tars_are_read_to_their_end(tmp_path: Path, zeros: int) -> None:
    joined = tar_of(ONE) + bytes(zeros * BLOCK) + tar_of(TWO)
    both = gzip.compress(tar_of(ONE)) + bytes(zeros) + gzip.compress(tar_of(TWO))
    for name, data in (("a.tar", joined), ("b.tar.gz", gzip.compress(joined)), ("c.tgz", both)):
        found = read(tmp_path / name, data)
        assert images(found) == {"a.jpg": ONE[0][1], "b.jpg": TWO[0][1]}
        assert found.texts == {"a.txt": b"of a", "b.txt": b"of b"}
        assert (found.damage, found.remarks) == ("", [])


def test_what_is_behind_the_end_and_no_tar_is_told_with_its_bytes(tmp_path: Path) -> None:
    tar = tar_of(ONE)
    told = f"1234 bytes from byte {len(tar)} on, after the end mark, are no tar and are ignored"
    for name, data in (("a.tar", tar + b"?" * 1234), ("a.tgz", gzip.compress(tar + b"?" * 1234))):
        found = read(tmp_path / name, data)
        assert (list(images(found)), found.remarks) == (["a.jpg"], [told])
    found = read(tmp_path / "b.tgz", gzip.compress(tar) + b"?" * 99)
    assert "99 bytes after its gzip stream" in found.remarks[0]
    first = zip_of(ONE)
    found = read(tmp_path / "a.zip", first + zip_of(TWO))
    assert list(images(found)) == ["b.jpg"]
    assert f"its first {len(first)} bytes are not in its table" in found.remarks[0]


def test_an_image_that_the_end_cuts_off_is_truncated(tmp_path: Path) -> None:
    tar = tar_of(ONE + TWO)
    cut = tar[: tar.index(TWO[0][1]) + 100]
    for name, data in (("a.tar", cut), ("a.tgz", gzip.compress(cut))):
        found = read(tmp_path / name, data)
        assert images(found) == {"a.jpg": ONE[0][1], "b.jpg": "truncated"}
        assert found.members[1].detail == "the archive ends after 100 of its bytes"
        assert found.damage == "it ends within b.jpg"
    packed = gzip.compress(tar, 0)
    found = read(tmp_path / "b.tgz", packed[: packed.index(TWO[0][1]) + 100])
    assert images(found) == {"a.jpg": ONE[0][1], "b.jpg": "truncated"}
    assert found.damage == "its gzip stream is cut off"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
def test_a_zips_crc32_is_held_against_what_is_read(tmp_path: Path, method: int, name: str) -> None:
    data = bytearray(zip_of(ONE + TWO, method))
    data[data.index(name.encode()) + len(name) + 3] ^= 64
    found = read(tmp_path / "a.zip", bytes(data))
    damaged = name == "a.jpg"
    assert images(found) == {"a.jpg": "corrupt" if damaged else ONE[0][1], "b.jpg": TWO[0][1]}
    assert found.texts == {"a.txt": b"of a" if damaged else DAMAGED, "b.txt": b"of b"}
    if not damaged:
        assert found.remarks == ["1 of 4 members is damaged and left out: a.txt"]


@pytest.mark.parametrize("at", [14, 18, 22, 8, 32])  # crc32, packed, size, method, name
def test_a_members_own_header_is_held_against_the_table(tmp_path: Path, at: int) -> None:
    data = bytearray(zip_of(ONE + TWO))
    data[data.index(b"PK\3\4") + at] ^= 1
    found = read(tmp_path / "a.zip", bytes(data))
    assert images(found) == {"a.jpg": "corrupt", "b.jpg": TWO[0][1]}
    assert found.remarks == ["1 of 4 members is damaged and left out: a.jpg"]


@pytest.mark.parametrize("size", [600, 2**31])
def test_what_inflates_to_more_than_it_claims_is_corrupt(tmp_path: Path, size: int) -> None:
    bomb = [("a.jpg", ONE[0][1][:600] + bytes(2**22)), *TWO]
    data = bytearray(zip_of(bomb))
    for signature, field in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        struct.pack_into("<L", data, data.index(signature) + field, size)
    found = read(tmp_path / "a.zip", bytes(data))
    assert images(found)["a.jpg"] == ("corrupt" if size == 600 else "too_many_bytes")
    with open_source(found.members[0].source) as file:
        assert file.read(100) == ONE[0][1][:100]


@pytest.mark.parametrize("size", [2**40, 2**62, 2**64 - 1])
def test_a_zip64_may_claim_anything(tmp_path: Path, size: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in ONE + TWO:
            file.writestr(name, data)
            if name.startswith("a"):
                file.infolist()[-1].file_size = size
    found = read(tmp_path / "a.zip")
    reason = "corrupt"  # for the member's own header tells its true size
    assert images(found) == {"a.jpg": reason, "b.jpg": TWO[0][1]}
    assert found.texts["a.txt"] == DAMAGED
    (record, _) = archive_records("x", tmp_path / "a.zip", SEARCH, Tally())
    assert record.stat.size <= 2**62


@pytest.mark.parametrize("where", ["crc", "length", "data", "second"])
def test_a_wrong_checksum_of_gzip_rejects_what_it_stands_for(tmp_path: Path, where: str) -> None:
    tar = tar_of(ONE)
    first = bytearray(gzip.compress(tar, 0))
    at = {"crc": -8, "length": -4, "data": first.index(ONE[0][1]), "second": -8}[where]
    first[at] ^= 1
    good = gzip.compress(tar_of(TWO))
    found = read(tmp_path / "a.tgz", bytes(good + first if where == "second" else first + good))
    assert images(found) == {"a.jpg": "corrupt", "b.jpg": TWO[0][1]}
    assert found.damage == "its gzip stream has another checksum or length than it says"
    assert found.texts == {"a.txt": DAMAGED, "b.txt": b"of b"}


def test_encrypted_members_are_counted_and_rejected(tmp_path: Path) -> None:
    data = bytearray(zip_of([(f"{i}.jpg", bytes(99)) for i in range(4)] + [("1.txt", b"x")]))
    for name in (b"1.jpg", b"2.jpg", b"1.txt"):
        data[data.index(name) - 24] |= 1
        data[data.rindex(name) - 38] |= 1
    found = read(tmp_path / "a.zip", bytes(data))
    assert [m.reason for m in found.members] == ["", "unsupported", "unsupported", ""]
    assert found.members[1].detail == "encrypted in its archive"
    with pytest.raises(BadSource, match="so its archive said"):
        read_source(found.members[1].source)
    told = "3 of 5 members are encrypted and left out: 1.jpg, 2.jpg, 1.txt"
    assert (found.damage, found.remarks) == ("", [told])


@KINDS
def test_hidden_files_are_passed_over_wherever_they_are(tmp_path: Path, kind: str) -> None:
    hidden = ["__MACOSX/._a.jpg", ".x.jpg", "d/.ipynb_checkpoints/a.jpg", "@eaDir/a.jpg/S.jpg"]
    names = [*hidden, "a.jpg", "d/b.jpg", "Thumbs.db"]
    (tmp_path / kind).write_bytes(MAKERS[kind]([(name, name.encode()) for name in names]))
    tally = Tally()
    records = list(archive_records("x", tmp_path / kind, SEARCH, tally))
    assert [record.key for record in records] == ["x/a.jpg", "x/d/b.jpg"]
    assert tally.passed_over == {"hidden": 4, "other files": 1}
    write_images(tmp_path / "f", [name for name in names if name.endswith("jpg")])
    tally = Tally()
    records = list(folder_records("x", tmp_path / "f", SEARCH, tally))
    assert [record.key for record in records] == ["x/a.jpg", "x/d/b.jpg"]
    assert tally.passed_over["hidden"] == 5  # a hidden caption as well


@pytest.mark.parametrize(
    ("tail", "told"),
    [
        (header("././@LongLink", 2**70, b"L") + bytes(512), "claims"),
        (header("././@LongLink", 2**40, b"L") + bytes(512), "bytes of names"),
        (header("././@LongLink", -512, b"L") + bytes(512), "claims -512 bytes"),
        (header("b.jpg", -512, b"7") + bytes(512), "claims -512 bytes"),
        (header("b.jpg", 2**62) + bytes(512), "claims"),
        (header("b.jpg", 2**40) + bytes(512), "it ends within b.jpg"),
        (header("p", 30, b"x") + b"30 path".ljust(512, b"\0"), "pax records"),
        (header("p", 30, b"x") + b"9" * 30 + bytes(482), "is damaged"),
        (header("p", 30, b"x"), "cut off"),
    ],
)
def test_headers_that_lie_cost_what_follows_and_no_memory(
    tmp_path: Path, tail: bytes, told: str
) -> None:
    head = tar_of(ONE[:1])[:1536]
    for name, data in (("a.tar", head + tail), ("a.tgz", gzip.compress(head + tail))):
        found = read(tmp_path / name, data)
        assert images(found).pop("a.jpg") == ONE[0][1]
        assert told in found.damage


def test_long_chains_of_headers_are_no_recursion(tmp_path: Path) -> None:
    name = header("././@LongLink", 6, b"L") + b"b.jpg\0".ljust(512, b"\0")
    found = read(tmp_path / "a.tar", name * 3000 + tar_of(ONE))
    assert images(found) == {"b.jpg": ONE[0][1]}


def test_a_sparse_member_is_unsupported_and_the_next_is_read(tmp_path: Path) -> None:
    sparse = bytearray(header("s.jpg", 512, tarfile.GNUTYPE_SPARSE))
    pax = header("p", 22, b"x") + b"22 GNU.sparse.major=1\n".ljust(512, b"\0")
    data = bytes(sparse) + bytes(512) + pax + header("t.jpg", 3) + b"xyz".ljust(512, b"\0")
    found = read(tmp_path / "a.tar", data + tar_of(ONE))
    assert images(found) == {"s.jpg": "unsupported", "t.jpg": "unsupported", "a.jpg": ONE[0][1]}


@KINDS
def test_names_of_windows_and_of_other_encodings(tmp_path: Path, kind: str) -> None:
    names = ["naïve 写真.jpg", "d//e/./a.jpg", "/abs/b.jpg"]
    found = read(tmp_path / kind, MAKERS[kind]([(name, b"x") for name in names]))
    assert list(images(found)) == ["naïve 写真.jpg", "d/e/a.jpg", "abs/b.jpg"]
    if kind == "a.zip":
        data = zip_of([("d\\e\\a.jpg", b"x"), ("d\\", b""), ("\xe9\xff.jpg", b"x")])
        latin = data.replace("\xe9\xff".encode(), b"\xe9\xff\xfe\x80")  # flagged as UTF-8
        (tmp_path / kind).write_bytes(latin)
        keys = [r.key for r in archive_records("x", tmp_path / kind, SEARCH, Tally())]
        assert keys == ["x/d/e/a.jpg", r"x/\udce9\udcff\udcfe\udc80.jpg"]


def test_a_zip64_and_one_of_the_older_form_of_source(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("a.jpg", "w", force_zip64=True) as member,
    ):
        member.write(ONE[0][1])
    found = read(tmp_path / "a.zip")
    assert images(found) == {"a.jpg": ONE[0][1]}
    before, _, name = found.members[0].source.rpartition("=")
    assert read_source(f"{before}{name[8:]}") == ONE[0][1]  # without a crc32


@KINDS
def test_captions_that_are_no_captions_are_not_read(tmp_path: Path, kind: str) -> None:
    files = [*ONE[:1], ("a.txt", b"x" * (2**24 + 1)), *TWO]
    found = read(tmp_path / kind, MAKERS[kind](files))
    assert found.texts == {"a.txt": TOO_LARGE, "b.txt": b"of b"}
    assert found.remarks == ["1 of 4 members is too large and left out: a.txt"]


def test_composed_and_decomposed_names_are_one(tmp_path: Path) -> None:
    nfc, nfd = "caf\xe9", "cafe\u0301"
    (tmp_path / "f").mkdir()
    for image, caption in ((nfc, nfd), ("b" + nfd, "b" + nfc)):
        (tmp_path / "f" / f"{image}.jpg").write_bytes(b"x")
        (tmp_path / "f" / f"{caption}.txt").write_bytes(caption.encode())
    tally = Tally()
    found = [*folder_records("f", tmp_path / "f", SEARCH, tally)]
    files = [(f.name, f.read_bytes()) for f in (tmp_path / "f").iterdir()]
    for kind, make in MAKERS.items():
        (tmp_path / kind).write_bytes(make(files))
        found += archive_records("x", tmp_path / kind, SEARCH, tally)
    assert len(found) == 8
    assert all(record.sidecar("txt") for record in found)
    (tmp_path / "f" / f"{nfc}.txt").write_bytes(b"exact")
    exact = next(r for r in folder_records("f", tmp_path / "f", SEARCH, tally) if nfc in r.key)
    assert exact.sidecar("txt") == b"exact"


@KINDS
def test_one_image_of_a_sample_is_chosen_by_its_suffix(tmp_path: Path, kind: str) -> None:
    names = ["0.image.jpg", "0.mask.jpg", "1.IMAGE.JPG", "d/2.image.jpg", "3.jpg", "x.csv"]
    texts = ["0.txt", "0.mask.txt", "1.txt", "d/2.txt"]
    files = [(name, name.encode()) for name in (*names, *texts)]
    (tmp_path / kind).write_bytes(MAKERS[kind](files))
    for name, data in files:
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(data)
    search = Search(
        lambda name: name.endswith(".jpg"), frozenset(["txt"]), image_suffixes=("image.jpg",)
    )
    archive, folder = Tally(), Tally()
    for found in (
        list(archive_records("x", tmp_path / kind, search, archive)),
        list(folder_records("x", tmp_path / "f", search, folder)),
    ):
        said = {record.key: record.sidecar("txt") for record in found}
        keys = ["x/0.image.jpg", "x/1.IMAGE.JPG", "x/d/2.image.jpg"]
        assert said == dict(zip(keys, (b"0.txt", b"1.txt", b"d/2.txt"), strict=True))
    assert archive.passed_over == folder.passed_over == {"other images": 2, "other files": 1}


@pytest.mark.parametrize(
    "data", [b"", b"no archive" * 99, gzip.compress(b"", mtime=0), bytes(10240)], ids=range(4)
)
@KINDS
def test_an_archive_that_is_none_costs_itself_and_is_named(
    tmp_path: Path, kind: str, data: bytes
) -> None:
    (tmp_path / kind).write_bytes(data)
    tally = Tally()
    assert not list(archive_records("x", tmp_path / kind, SEARCH, tally))
    assert len(tally.damaged) == 1
    assert str(tmp_path / kind) in tally.damaged[0]


def test_pages_of_parquet_are_held_against_their_checksums(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([os.urandom(3000), os.urandom(3000)])})
    path = tmp_path / "a.parquet"
    pq.write_table(
        table, path, compression="none", write_statistics=False, write_page_checksum=True
    )
    data = bytearray(path.read_bytes())
    data[data.index(table["image"][0].as_py()) + 50] ^= 1
    path.write_bytes(data)
    assert content(cell(path, "image", 1, 3000, "x")) == "corrupt"


def photos(*seeds: int) -> Files:
    """Images with captions, as files in an archive."""
    files: Files = []
    for seed in seeds:
        made = io.BytesIO()
        Image.fromarray(picture(seed, 160, 128)).save(made, "PNG")
        files += [(f"{seed}.png", made.getvalue()), (f"{seed}.txt", b"of %d" % seed)]
    return files


def test_a_folder_of_archives_builds_without_those_that_are_broken(
    tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.tar.gz").write_bytes(gzip.compress(tar_of(photos(1, 2))))
    (folder / "b.tar").write_bytes(tar_of(photos(3))[: 512 + 4000])
    (folder / "c.tar").write_bytes(b"")
    (folder / "d.tgz").write_bytes(b"broken")
    wrong = bytearray(gzip.compress(tar_of(photos(4))))
    wrong[-8] ^= 1
    (folder / "e.tgz").write_bytes(wrong)
    write_images(folder, ["f.png", "g.png"], first_seed=50, width=160, height=128)
    os.truncate(folder / "g.png", 2**37)  # sparse, and never read
    options = ("--vae", vae, "--resolution", 128, "--batch", 2)
    assert cache("build", folder, "--out", tmp_path / "l", *options) == 0
    said = capsys.readouterr()
    for name, told in (
        ("b.tar", "it ends within 3.png"),
        ("c.tar", "it is empty"),
        ("d.tgz", "it is not compressed by gzip"),
        ("e.tgz", "another checksum or length"),
    ):
        assert any(name in line and told in line for line in said.err.splitlines())
    counts = sums(tmp_path / "l", capsys)
    assert (counts["scanned"], counts["encoded"]) == (6, 3)
    assert counts["rejected"] == {"truncated": 1, "corrupt": 1, "too_many_bytes": 1}


def test_a_damaged_member_is_rejected_once_and_for_all(
    tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = photos(1, 2)
    data = bytearray(zip_of(files, zipfile.ZIP_STORED))
    data[data.index(files[0][1]) + len(files[0][1]) - 30] ^= 1  # far behind the image's header
    (tmp_path / "a.zip").write_bytes(data)
    options = (tmp_path / "a.zip", "--out", tmp_path / "l", "--vae", vae, "--resolution", 128)
    assert cache("build", *options, "--batch", 2) == 0
    assert "2 scanned = 1 encoded + 0 reused + 0 duplicate + 1 rejected (corrupt 1)" in (
        printed(capsys)
    )
    rejected = pq.read_table(tmp_path / "l" / "rejected.parquet").to_pylist()
    assert rejected[0]["key"] == "a.zip/1.png"
    assert cache("build", *options, "--batch", 2) == 0
    assert "to encode: 0 images" in printed(capsys)


def test_sources_of_an_older_version_are_only_renamed(
    tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of(photos(1, 2, 3), zipfile.ZIP_STORED))
    options = (tmp_path / "a.zip", "--out", tmp_path / "l", "--vae", vae, "--resolution", 128)
    span = locate.span
    with monkeypatch.context() as patched:
        patched.setattr(archives, "span", lambda *args: span(*args[:5]))  # without a crc32
        assert cache("build", *options, "--batch", 2) == 0
    assert "=" not in LatentStore.open(tmp_path / "l").samples["source"][0].as_py()
    capsys.readouterr()
    assert cache("build", *options, "--batch", 2) == 0
    assert "3 scanned = 0 encoded + 3 reused" in printed(capsys)
    assert "=" in LatentStore.open(tmp_path / "l").samples["source"][0].as_py()


def damaged(data: bytes, draw: Any) -> bytes:
    """With bytes changed, parts left out or doubled, its end cut off, or something behind it."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(made), 200)) | st.integers(0, len(made)))
        end = min(len(made), at + draw(st.sampled_from([1, 2, 4, 16, 300])))
        match draw(st.sampled_from(["flip", "set", "cut", "double", "drop", "more"])):
            case "flip" if at < end:
                made[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                made[at:end] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f"])) * (end - at)
            case "cut":
                del made[end:]
            case "double":
                made[at:at] = made[at:end]
            case "drop":
                del made[at:end]
            case "more":
                made += data[at:]
    return bytes(made)


@KINDS
@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_archive_gives_its_members_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / kind
    try:
        found = read(path, damaged(MAKERS[kind](ONE + TWO), data.draw))
    except UserError:
        return
    for member in found.members:
        assert member.reason in {"", "corrupt", "truncated", "unsupported"}
        got = content(member.source)
        if kind == "a.zip" and not member.reason:  # the others have no checksum of each member
            assert got in {"corrupt", "truncated", "too_many_bytes", ONE[0][1], TWO[0][1]}
    for text in found.texts.values():
        assert kind != "a.zip" or isinstance(text, NotRead) or text in {b"of a", b"of b"}
