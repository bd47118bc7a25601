"""Source URI -> bytes: of an image file, a member of an archive, or a cell of a table.

A source is a path, or `ARCHIVE//PLACE/NAME`, which differ because no path of ours has an empty
part. PLACE has all that reading needs, so no index is built, a tar member takes one read, and any
number of threads and processes may read at once.

    photos/a.jpg                                   a file
    shards/00000.tar//1536+48211/0.jpg             48211 bytes at offset 1536
    00000.tar.gz//1536+48211/0.jpg                 the same, of the inflated content
    photos.zip//4096+3000=0badcafe/a.jpg           3000 bytes at offset 4096 with crc32 0badcafe
    photos.zip//4096+3000~5120=0badcafe/a.bmp      the same, which inflate to 5120 bytes
    photos.zip//-corrupt/a.jpg                     an unreadable member, and the outcomes.REASONS
    photos.parquet//image@17+48211/a.jpg           column `image`, row 17, 48211 bytes
"""

import io
import os
import re
import sys
import zlib
from pathlib import Path
from typing import IO, NamedTuple, cast

from xlsd_cache.files.gzip_index import gzip_of
from xlsd_cache.files.inflate import BadSource, FileSlice, inflate
from xlsd_cache.files.table_cells import read_cell
from xlsd_cache.outcomes import Reason
from xlsd_cache.runtime.bounded_files import open_regular

SEPARATOR = "//"
GZIPPED = (".tar.gz", ".tgz")  # archives whose offsets are in the inflated content
_UNREADABLE = re.compile(r"-([a-z_]+)/")
_SPAN = re.compile(r"(\d{1,19})\+(\d{1,19})(?:~(\d{1,19}))?(?:=([0-9a-f]{8}))?/", re.DOTALL)
_CELL = re.compile(r"([^/]+)@(\d+)\+(\d+)/", re.DOTALL)


class Stat(NamedTuple):
    """File metadata by which to detect a change without reading the file.

    Programs can preserve size and mtime; only the system sets the other two.
    """

    size: int  # bytes; of a member, inflated
    mtime_ns: int
    inode: int
    ctime_ns: int  # Windows: when the file was created

    @classmethod
    def of(cls, status: os.stat_result) -> "Stat":
        """From os.stat, with the inode reduced to int64: Windows has larger ones."""
        return cls(
            status.st_size, status.st_mtime_ns, status.st_ino & 2**63 - 1, status.st_ctime_ns
        )


def span(
    archive: Path,
    offset: int,
    length: int,
    name: str,
    inflated: int | None = None,
    crc: int | None = None,
) -> str:
    """The source URI of an archive's member.

    `inflated` is its inflated size if it is deflated, `crc` the crc32 of its content if known.
    """
    size = "" if inflated is None else f"~{inflated}"
    check = "" if crc is None else f"={crc:08x}"
    return f"{archive}{SEPARATOR}{offset}+{length}{size}{check}/{name}"


def unreadable_member(archive: Path, reason: str, name: str) -> str:
    """The source URI of a member that cannot be read, with a reason of outcomes.REASONS."""
    return f"{archive}{SEPARATOR}-{reason}/{name}"


def cell(table: Path, column: str, row: int, size: int, name: str) -> str:
    """The source URI of an image in a cell of a parquet or .arrow file; `column` may be dotted."""
    return f"{table}{SEPARATOR}{column}@{row}+{size}/{name}"


def read_source(source: str, most: int = sys.maxsize) -> bytes:
    """All bytes of the image.

    Raises FileNotFoundError if the file or archive is gone, BadSource if the bytes contradict the
    archive or are more than `most`, and OSError.
    """
    archive, _, place = source.partition(SEPARATOR)
    if not place:
        return _read_file(Path(source), most)
    if at := _SPAN.match(place):
        offset, length, size = int(at[1]), int(at[2]), int(at[3] or at[2])
        _refuse_above(most, max(length, size))
        data = _read_span(archive, offset, length)
        if len(data) < length:
            raise BadSource("truncated", f"{archive} ends before {place}")
        if at[3] is not None:
            data = inflate(data, size)
        if at[4] is not None and zlib.crc32(data) != int(at[4], 16):
            raise BadSource("corrupt", "its bytes do not have the crc32 that its archive tells")
        return data
    if at := _CELL.match(place):
        _refuse_above(most, int(at[3]))
        return read_cell(archive, at[1], int(at[2]))
    raise _unknown_source(source, place)


def open_source(source: str, most: int = sys.maxsize) -> IO[bytes]:
    """The image as a file object, without reading all of it where possible.

    Opening and reading raise OSError as `read_source` does.
    """
    archive, _, place = source.partition(SEPARATOR)
    if not place:
        return open_regular(source)
    at = _SPAN.match(place)
    if at is None or archive.endswith(GZIPPED):
        return io.BytesIO(read_source(source, most))
    offset, length, size = int(at[1]), int(at[2]), int(at[3] or at[2])
    _refuse_above(most, max(length, size))
    file = open_regular(archive, buffered=False)
    return io.BufferedReader(FileSlice(file, offset, length, size if at[3] else None), 16384)


def stat_source(source: str) -> Stat:
    """The metadata of a source, equal to the scan's if nothing has changed. Raises OSError.

    A member has the times of its archive.
    """
    archive, _, place = source.partition(SEPARATOR)
    stat = Stat.of(Path(archive).stat())
    if not place:
        return stat
    if at := _SPAN.match(place):
        return stat._replace(size=int(at[3] or at[2]))
    if at := _CELL.match(place):
        return stat._replace(size=int(at[3]))
    raise _unknown_source(source, place)


def _refuse_above(most: int, nbytes: int) -> None:
    if nbytes > most:
        raise BadSource("too_many_bytes", f"{nbytes} bytes are more than {most}")


def _unknown_source(source: str, place: str) -> OSError:
    if at := _UNREADABLE.match(place):
        return BadSource(cast("Reason", at[1]), "so its archive said when it was scanned")
    return OSError(f"{source!r} is no source that this version knows")


def _read_file(path: Path, most: int) -> bytes:
    with open_regular(path) as file:
        _refuse_above(most, os.fstat(file.fileno()).st_size)
        return file.read()


def _read_span(archive: str, offset: int, length: int) -> bytes:
    """Bytes of an archive, fewer if it ends before."""
    if archive.endswith(GZIPPED):
        return gzip_of(Path(archive)).read_at(offset, length)
    with open_regular(archive) as file:
        if offset + length > os.fstat(file.fileno()).st_size:  # a forged length may be of any size
            return b""
        file.seek(offset)
        return file.read(length)
