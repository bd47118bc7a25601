"""Tars and zips read in place: each member's bytes found once, and read with one read later.

The last member of a name counts, as it does when the archive is unpacked.
"""

import zlib
from pathlib import Path
from typing import IO

from xlsd_cache.archives.members import Asked, Members, Roll, normal, printable
from xlsd_cache.archives.tar import Entry as TarEntry
from xlsd_cache.archives.tar import Tar
from xlsd_cache.archives.zip import DEFLATED, STORED, NoZip, Zip
from xlsd_cache.archives.zip import Entry as ZipEntry
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import DAMAGED, ENCRYPTED, PACKED, LeftOut
from xlsd_cache.files.gzip_index import END, gzip_of
from xlsd_cache.files.inflate import BadSource, ReadAt, inflate
from xlsd_cache.files.uri import GZIPPED, span
from xlsd_cache.runtime.bounded_files import open_regular

_BEHIND = 2**36  # bytes behind a tar's end that a gzip stream is inflated for, to be checked


def read_members(archive: Path, asked: Asked) -> Members:
    """The images and captions that are asked for, these with their content.

    Raises UserError for a file that is no archive at all.
    """
    reader = _read_zip if archive.suffix.lower() == ".zip" else _read_tar
    try:
        with open_regular(archive) as file:
            return reader(archive, file, asked)
    except (OSError, NoZip) as error:
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"cannot read {archive}: {told}; mend it, unpack it if compressed, or leave it out"
        ) from error


def _read_tar(archive: Path, file: IO[bytes], asked: Asked) -> Members:
    nbytes = file.seek(0, 2)
    roll: Roll[TarEntry] = Roll(asked, nbytes)
    if not archive.name.endswith(GZIPPED):
        tar = Tar(_reader(file))
        _walk(tar, roll, tar.read_at)
        _settle_tar(archive, tar, roll, nbytes, [])
        return roll.told()
    gzip = gzip_of(archive)
    cursor = gzip.cursor(file)
    tar = Tar(cursor.read_at)
    try:
        _walk(tar, roll, gzip.read_at)
    except OSError:
        if cursor.ending in ("", END) and cursor.behind < nbytes:
            raise
        told = "it is not compressed by gzip" if cursor.behind else f"its gzip is {cursor.ending}"
        raise OSError(told) from None
    _settle_tar(archive, tar, roll, cursor.drain(_BEHIND), cursor.bad)
    if cursor.ending != END:
        roll.found.damage = f"its gzip stream is {cursor.ending}"
    elif cursor.bad:
        roll.found.damage = "its gzip stream has another checksum or length than it says"
    elif cursor.behind:
        roll.found.remarks.append(f"{cursor.behind} bytes behind its gzip stream are none")
    return roll.told()


def _reader(file: IO[bytes]) -> ReadAt:
    def read_at(offset: int, count: int) -> bytes:
        file.seek(offset)
        return file.read(count)

    return read_at


def _walk(tar: Tar, roll: Roll[TarEntry], read_again: ReadAt) -> None:
    """Put all members on the roll, and read the captions among them.

    Raises OSError where there is none, nor the end mark of an empty tar.
    """
    files: dict[str, TarEntry] = {}  # what hard links may lead to
    anything = False
    for entry in tar:
        anything = True
        name = normal(entry.name)
        read_at: ReadAt = tar.read_at
        if entry.kind == "folder":
            files.pop(name, None)
            roll.put_folder(name)
            continue
        if entry.kind == "hardlink":
            entry, read_at = files.get(normal(entry.link), entry), read_again  # noqa: PLW2901
        if entry.kind == "file":
            files[name] = entry
        else:
            files.pop(name, None)
        if roll.put(name, entry) and roll.asked.is_caption(name):
            _keep_text(name, entry, roll, read_at)
    if not anything and tar.damage:
        raise OSError("it is empty" if "at byte 0 with" in tar.damage else "it is no tar")


def _keep_text(name: str, entry: TarEntry, roll: Roll[TarEntry], read_at: ReadAt) -> None:
    def read() -> bytes | LeftOut:
        try:
            data = read_at(entry.offset, entry.size)
        except BadSource:
            return DAMAGED
        return data if len(data) == entry.size else DAMAGED

    if entry.kind == "file":
        roll.keep_text(name, entry.size, read)
    else:
        roll.found.texts.pop(name, None)


def _settle_tar(
    archive: Path, tar: Tar, roll: Roll[TarEntry], end: int, bad: list[tuple[int, int]]
) -> None:
    """Keep the images of a tar that ends at byte `end`, and is damaged in the stretches `bad`."""
    for name, entry in roll.places.items():
        stop = entry.offset + entry.size
        is_bad = any(entry.offset < last and stop > first for first, last in bad)
        if is_bad and name in roll.found.texts:
            roll.found.texts[name] = DAMAGED
        if entry.kind == "sparse" and roll.asked.is_image(name):
            roll.leave_out(name, "sparse")
            roll.reject(archive, name, entry.size, "unsupported", "a sparse member of a tar")
        elif entry.kind != "file":
            roll.found.passed_over["other files"] += 1
        elif roll.asked.is_image(name):
            if is_bad:
                told = "its gzip stream is damaged, and any of its bytes may be wrong"
                roll.reject(archive, name, entry.size, "corrupt", told)
            elif stop > end:
                told = f"the archive ends after {end - entry.offset} of its bytes"
                roll.reject(archive, name, entry.size, "truncated", told)
            else:
                roll.keep(
                    name, span(archive, entry.offset, entry.size, printable(name)), entry.size
                )
    roll.found.damage = tar.damage
    if tar.damage and tar.last and tar.last.offset + tar.last.size > end:
        roll.found.damage = f"it ends within {printable(tar.last.name)}"
    if tar.behind >= 0:
        behind = f"{end - tar.behind} bytes from byte {tar.behind} on, behind the end mark"
        roll.found.remarks.append(f"{behind}, are no tar and are not read")


def _read_zip(archive: Path, file: IO[bytes], asked: Asked) -> Members:
    table = Zip(file)
    roll: Roll[ZipEntry] = Roll(asked, table.length)
    for entry in table:
        name = normal(entry.name)
        if entry.name.endswith("/"):
            roll.put_folder(name)
        else:
            roll.put(name, entry)
    for name, entry in roll.places.items():
        _settle_zip(archive, table, name, entry, roll, _reader(file))
    roll.found.damage = table.damage
    if table.before and _reader(file)(0, 4) == b"PK\3\4":
        first = f"its first {table.before} bytes"
        roll.found.remarks.append(f"{first} are in no table, as of another zip before it")
    return roll.told()


def _settle_zip(
    archive: Path, table: Zip, name: str, entry: ZipEntry, roll: Roll[ZipEntry], read_at: ReadAt
) -> None:
    """Keep the member, or why it is not read."""
    left_out, reason, detail, place = "", "", "", 0
    if entry.is_encrypted:
        left_out, reason, detail = ENCRYPTED, "unsupported", "encrypted in its archive"
    elif entry.method not in (STORED, DEFLATED):
        detail = f"compressed by method {entry.method} of zip, which is not read"
        left_out, reason = PACKED, "unsupported"
    else:
        try:
            place = table.place(entry)
        except ValueError as error:
            left_out, reason, detail = DAMAGED, "corrupt", f"damaged in its archive: {error}"
        else:
            if entry.size >= 2**62:  # nor could a table of ours hold it
                detail = f"damaged in its archive: it claims {entry.size} bytes"
                left_out, reason = DAMAGED, "corrupt"
            elif place + entry.packed > table.length:
                detail = "the archive ends within it"
                left_out, reason = DAMAGED, "truncated"
    if roll.asked.is_caption(name):
        _keep_zipped_text(name, entry, place, roll, LeftOut(left_out), read_at)
    if not roll.asked.is_image(name):
        return
    if left_out:
        roll.leave_out(name, left_out)
        roll.reject(archive, name, entry.size, reason, detail)
        return
    size = None if entry.method == STORED else entry.size
    source = span(archive, place, entry.packed, printable(name), size, entry.crc)
    roll.keep(name, source, entry.size)


def _keep_zipped_text(
    name: str, entry: ZipEntry, place: int, roll: Roll[ZipEntry], left_out: LeftOut, read_at: ReadAt
) -> None:
    def read() -> bytes | LeftOut:
        data = read_at(place, entry.packed)
        try:
            text = inflate(data, entry.size) if entry.method == DEFLATED else data
        except BadSource:
            return DAMAGED
        return text if zlib.crc32(text) == entry.crc else DAMAGED

    if left_out:
        roll.found.texts[name] = left_out
    else:
        roll.keep_text(name, max(entry.size, entry.packed), read)
