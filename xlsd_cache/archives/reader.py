"""Lists the members of tars and zips, each with the source URI that reads it in place later.

The last member of a name counts, as it does when the archive is unpacked. The
`detail` of a rejected image goes to the log, so these texts must not change.
"""

import zlib
from pathlib import Path
from typing import IO

from xlsd_cache.archives.members import ArchiveContents, Collector, MemberFilter, normal, printable
from xlsd_cache.archives.tar import TarEntry, TarReader
from xlsd_cache.archives.zip import DEFLATED, STORED, NotAZip, ZipEntry, ZipReader
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import DAMAGED, ENCRYPTED, PACKED, NotRead
from xlsd_cache.files.gzip_index import END, gzip_of
from xlsd_cache.files.inflate import BadSource, ReadAt, inflate
from xlsd_cache.files.uri import GZIPPED, span
from xlsd_cache.runtime.bounded_files import open_regular

_TRAILING = 2**36  # bytes after a tar's end that are inflated to check the gzip stream
TarMembers = Collector[TarEntry]
ZipMembers = Collector[ZipEntry]


def read_members(archive: Path, wanted: MemberFilter) -> ArchiveContents:
    """The wanted images and captions of an archive, captions with their content.

    Raises UserError for a file that is no archive at all.
    """
    reader = _read_zip if archive.suffix.lower() == ".zip" else _read_tar
    try:
        with open_regular(archive) as file:
            return reader(archive, file, wanted)
    except (OSError, NotAZip) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"cannot read {archive}: {why}; mend it, unpack it if compressed, or leave it out"
        ) from error


def _read_tar(archive: Path, file: IO[bytes], wanted: MemberFilter) -> ArchiveContents:
    nbytes = file.seek(0, 2)
    members: TarMembers = Collector(wanted, nbytes)
    if not archive.name.endswith(GZIPPED):
        tar = TarReader(_reader(file))
        _walk(tar, members, tar.read_at)
        _settle_tar(archive, tar, members, nbytes, [])
        return members.result()
    gzip = gzip_of(archive)
    cursor = gzip.cursor(file)
    tar = TarReader(cursor.read_at)
    try:
        _walk(tar, members, gzip.read_at)
    except OSError:
        if cursor.ending in ("", END) and cursor.behind < nbytes:
            raise
        why = "it is not compressed by gzip" if cursor.behind else f"its gzip is {cursor.ending}"
        raise OSError(why) from None
    _settle_tar(archive, tar, members, cursor.drain(_TRAILING), cursor.bad)
    if cursor.ending != END:
        members.contents.damage = f"its gzip stream is {cursor.ending}"
    elif cursor.bad:
        members.contents.damage = "its gzip stream has another checksum or length than it says"
    elif cursor.behind:
        members.contents.remarks.append(f"{cursor.behind} bytes after its gzip stream are ignored")
    return members.result()


def _reader(file: IO[bytes]) -> ReadAt:
    def read_at(offset: int, count: int) -> bytes:
        file.seek(offset)
        return file.read(count)

    return read_at


def _walk(tar: TarReader, members: TarMembers, read_again: ReadAt) -> None:
    """Collect all members, and read the captions among them.

    Raises OSError where there is neither a member nor the end mark of an empty tar.
    """
    files: dict[str, TarEntry] = {}  # targets of hard links
    is_tar = False
    for entry in tar:
        is_tar = True
        name = normal(entry.name)
        read_at: ReadAt = tar.read_at
        if entry.kind == "folder":
            files.pop(name, None)
            members.add_folder(name)
            continue
        if entry.kind == "hardlink":
            entry, read_at = files.get(normal(entry.link), entry), read_again  # noqa: PLW2901
        if entry.kind == "file":
            files[name] = entry
        else:
            files.pop(name, None)
        if members.add_file(name, entry) and members.wanted.is_caption(name):
            _keep_text(name, entry, members, read_at)
    if not is_tar and tar.damage:
        raise OSError("it is empty" if "at byte 0 with" in tar.damage else "it is no tar")


def _keep_text(name: str, entry: TarEntry, members: TarMembers, read_at: ReadAt) -> None:
    def read() -> bytes | NotRead:
        try:
            data = read_at(entry.offset, entry.size)
        except BadSource:
            return DAMAGED
        return data if len(data) == entry.size else DAMAGED

    if entry.kind == "file":
        members.keep_text(name, entry.size, read)
    else:
        members.contents.texts.pop(name, None)


def _settle_tar(
    archive: Path, tar: TarReader, members: TarMembers, end: int, bad: list[tuple[int, int]]
) -> None:
    """Keep the images of a tar that ends at byte `end`, with damage in the ranges `bad`."""
    for name, entry in members.locations.items():
        stop = entry.offset + entry.size
        is_bad = any(entry.offset < last and stop > first for first, last in bad)
        if is_bad and name in members.contents.texts:
            members.contents.texts[name] = DAMAGED
        if entry.kind == "sparse" and members.wanted.is_image(name):
            members.leave_out(name, "sparse")
            members.reject(archive, name, entry.size, "unsupported", "a sparse member of a tar")
        elif entry.kind != "file":
            members.contents.passed_over["other files"] += 1
        elif members.wanted.is_image(name):
            if is_bad:
                why = "its gzip stream is damaged, and any of its bytes may be wrong"
                members.reject(archive, name, entry.size, "corrupt", why)
            elif stop > end:
                why = f"the archive ends after {end - entry.offset} of its bytes"
                members.reject(archive, name, entry.size, "truncated", why)
            else:
                members.keep(
                    name, span(archive, entry.offset, entry.size, printable(name)), entry.size
                )
    members.contents.damage = tar.damage
    if tar.damage and tar.last and tar.last.offset + tar.last.size > end:
        members.contents.damage = f"it ends within {printable(tar.last.name)}"
    if tar.trailing >= 0:
        nbytes = f"{end - tar.trailing} bytes from byte {tar.trailing} on, after the end mark"
        members.contents.remarks.append(f"{nbytes}, are no tar and are ignored")


def _read_zip(archive: Path, file: IO[bytes], wanted: MemberFilter) -> ArchiveContents:
    table = ZipReader(file)
    members: ZipMembers = Collector(wanted, table.length)
    for entry in table:
        name = normal(entry.name)
        if entry.name.endswith("/"):
            members.add_folder(name)
        else:
            members.add_file(name, entry)
    for name, entry in members.locations.items():
        _settle_zip(archive, table, name, entry, members, _reader(file))
    members.contents.damage = table.damage
    if table.before and _reader(file)(0, 4) == b"PK\3\4":
        first = f"its first {table.before} bytes"
        members.contents.remarks.append(f"{first} are not in its table: another zip precedes it")
    return members.result()


def _settle_zip(
    archive: Path,
    table: ZipReader,
    name: str,
    entry: ZipEntry,
    members: ZipMembers,
    read_at: ReadAt,
) -> None:
    """Keep the member, or the reason why it is not read."""
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
    if members.wanted.is_caption(name):
        _keep_zipped_text(name, entry, place, members, NotRead(left_out), read_at)
    if not members.wanted.is_image(name):
        return
    if left_out:
        members.leave_out(name, left_out)
        members.reject(archive, name, entry.size, reason, detail)
        return
    size = None if entry.method == STORED else entry.size
    source = span(archive, place, entry.packed, printable(name), size, entry.crc)
    members.keep(name, source, entry.size)


def _keep_zipped_text(
    name: str,
    entry: ZipEntry,
    place: int,
    members: ZipMembers,
    left_out: NotRead,
    read_at: ReadAt,
) -> None:
    def read() -> bytes | NotRead:
        data = read_at(place, entry.packed)
        try:
            text = inflate(data, entry.size) if entry.method == DEFLATED else data
        except BadSource:
            return DAMAGED
        return text if zlib.crc32(text) == entry.crc else DAMAGED

    if left_out:
        members.contents.texts[name] = left_out
    else:
        members.keep_text(name, max(entry.size, entry.packed), read)
