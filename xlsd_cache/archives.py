"""Tars and zips read in place: each member's bytes found once, and read with one read later."""

import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from xlsd_cache import UserError
from xlsd_cache.locate import span


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an archive."""

    name: str
    source: str  # see locate.py
    size: int  # bytes, inflated


@dataclass
class Members:
    """What an archive holds, in its order; `damage` says what of it could not be read."""

    members: list[Member]
    texts: dict[str, bytes]  # name -> content of those asked for
    others: int = 0  # links to nowhere, devices and the like
    damage: str = ""


def read_members(
    archive: Path, wanted: Callable[[str], bool], texts: Callable[[str], bool]
) -> Members:
    """The members called `wanted`, and the content of those that `texts` names.

    Raises UserError for a file that is no archive at all.
    """
    reader = _read_zip if archive.suffix.lower() == ".zip" else _read_tar
    try:
        return reader(archive, wanted, texts)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"cannot read {archive}: {told}; mend it, unpack it if compressed, or leave it out"
        ) from error


def _read_tar(
    archive: Path, wanted: Callable[[str], bool], texts: Callable[[str], bool]
) -> Members:
    found = Members([], {})
    spans: dict[str, tuple[int, int]] = {}
    nbytes = archive.stat().st_size
    with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in _tar_members(tar, file, found):
            name = member.name.removeprefix("./")
            if member.isdir():
                continue
            at = spans.get(member.linkname.removeprefix("./")) if member.islnk() else None
            if member.isreg() and not member.issparse():
                at = spans[name] = member.offset_data, member.size
            if at is None:
                found.others += 1
                continue
            if sum(at) > nbytes:
                found.damage = f"it ends within {name}"
            source = span(archive, *at, name)
            if texts(name) and sum(at) <= nbytes:
                file.seek(at[0])
                found.texts[name] = file.read(at[1])
            if wanted(name):
                found.members.append(Member(name, source, at[1]))
            elif not texts(name):
                found.others += 1
    return found


def _tar_members(
    tar: tarfile.TarFile, file: IO[bytes], found: Members
) -> Iterator[tarfile.TarInfo]:
    """The members up to the end, or to where the tar is cut or damaged, which `found` then says.

    tarfile takes a damaged header for the end of the archive; a real end is two blocks of zeros.
    """
    try:
        while (member := tar.next()) is not None:
            yield member
            tar.members.clear()  # type: ignore[attr-defined]  # else the whole of a large tar is kept a second time
    except (tarfile.TarError, OSError) as error:
        found.damage = f"from byte {tar.offset} on it cannot be read: {error}"
        return
    file.seek(tar.offset)
    end = file.read(2 * tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        found.damage = f"at byte {tar.offset} there is neither a member nor the end mark"


def _read_zip(
    archive: Path, wanted: Callable[[str], bool], texts: Callable[[str], bool]
) -> Members:
    found = Members([], {})
    with zipfile.ZipFile(archive) as table, archive.open("rb") as file:
        for member in table.infolist():
            if member.is_dir():
                continue
            if not wanted(member.filename) and not texts(member.filename):
                found.others += 1
                continue
            if member.flag_bits & 1 or member.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                found.damage = (
                    f"{member.filename} is encrypted, or compressed otherwise than by deflate"
                )
                found.others += 1
                continue
            file.seek(member.header_offset)
            head = file.read(30)  # the local header's own name and extra field may differ in length
            if len(head) < 30 or not head.startswith(b"PK\3\4"):
                found.damage = f"{member.filename} is not where the table says"
                found.others += 1
                continue
            names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            inflated = None if member.compress_type == zipfile.ZIP_STORED else member.file_size
            place = member.header_offset + 30 + names, member.compress_size
            source = span(archive, *place, member.filename, inflated)
            if texts(member.filename):
                found.texts[member.filename] = table.read(member)
            if wanted(member.filename):
                found.members.append(Member(member.filename, source, member.file_size))
    return found
