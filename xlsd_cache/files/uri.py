"""Source string -> bytes: an image file, or the stretch of an archive that holds one.

A source is a path, or `ARCHIVE//PLACE/NAME`. No path of ours has an empty part, so the two cannot
be mistaken. PLACE says all that reading needs: nothing is indexed first, a tar member costs one
read, and any number of threads and processes may read at once.

    photos/a.jpg                                   a file
    shards/00000.tar//1536+48211/0.jpg             the 48211 bytes at 1536
    00000.tar.gz//1536+48211/0.jpg                 the same, of what the file inflates to
    photos.zip//4096+3000=0badcafe/a.jpg           the 3000 bytes at 4096, whose crc32 is 0badcafe
    photos.zip//4096+3000~5120=0badcafe/a.bmp      the same, which inflate to 5120
    photos.zip//-corrupt/a.jpg                     none: why not, of outcomes.REASONS
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
from xlsd_cache.files.inflate import BadSource, Stretch, inflate
from xlsd_cache.files.table_cells import read_cell
from xlsd_cache.outcomes import Reason
from xlsd_cache.runtime.bounded_files import open_regular

BETWEEN = "//"
GZIPPED = (".tar.gz", ".tgz")  # tars whose places are in what they inflate to
_NO_PLACE = re.compile(r"-([a-z_]+)/")
_SPAN = re.compile(r"(\d{1,19})\+(\d{1,19})(?:~(\d{1,19}))?(?:=([0-9a-f]{8}))?/", re.DOTALL)
_CELL = re.compile(r"([^/]+)@(\d+)\+(\d+)/", re.DOTALL)


class Stat(NamedTuple):
    """What tells whether a file is still the one that was read, without reading it again.

    A program may keep size and mtime; only the system sets the other two.
    """

    size: int  # bytes; of a member, inflated
    mtime_ns: int
    inode: int
    ctime_ns: int  # Windows: when the file was created

    @classmethod
    def of(cls, status: os.stat_result) -> "Stat":
        """As a table of int64 holds it: Windows has inodes beyond."""
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
    """The source of an archive's member.

    `inflated` is its size where it is deflated, `crc` the crc32 of its content where that is known.
    """
    size = "" if inflated is None else f"~{inflated}"
    check = "" if crc is None else f"={crc:08x}"
    return f"{archive}{BETWEEN}{offset}+{length}{size}{check}/{name}"


def no_place(archive: Path, reason: str, name: str) -> str:
    """The source of a member that cannot be read, for a reason of outcomes.REASONS."""
    return f"{archive}{BETWEEN}-{reason}/{name}"


def cell(table: Path, column: str, row: int, size: int, name: str) -> str:
    """The source of the image in one cell of a parquet or .arrow file; `column` may be dotted."""
    return f"{table}{BETWEEN}{column}@{row}+{size}/{name}"


def read_source(source: str, most: int = sys.maxsize) -> bytes:
    """All bytes of the image.

    Raises FileNotFoundError where file or archive is gone, BadSource where they are not what their
    container says or are more than `most`, and OSError.
    """
    archive, _, place = source.partition(BETWEEN)
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
    raise _no_source(source, place)


def open_source(source: str, most: int = sys.maxsize) -> IO[bytes]:
    """The image as a file to read from, without reading all of it where that can be helped.

    Raises OSError like `read_source`; so does reading.
    """
    archive, _, place = source.partition(BETWEEN)
    if not place:
        return open_regular(source)
    at = _SPAN.match(place)
    if at is None or archive.endswith(GZIPPED):
        return io.BytesIO(read_source(source, most))
    offset, length, size = int(at[1]), int(at[2]), int(at[3] or at[2])
    _refuse_above(most, max(length, size))
    file = open_regular(archive, buffered=False)
    return io.BufferedReader(Stretch(file, offset, length, size if at[3] else None), 16384)


def stat_source(source: str) -> Stat:
    """As the scan saw it, if nothing has changed. Raises OSError.

    A member changes with its archive, whose times stand for it.
    """
    archive, _, place = source.partition(BETWEEN)
    stat = Stat.of(Path(archive).stat())
    if not place:
        return stat
    if at := _SPAN.match(place):
        return stat._replace(size=int(at[3] or at[2]))
    if at := _CELL.match(place):
        return stat._replace(size=int(at[3]))
    raise _no_source(source, place)


def _refuse_above(most: int, nbytes: int) -> None:
    if nbytes > most:
        raise BadSource("too_many_bytes", f"{nbytes} bytes are more than {most}")


def _no_source(source: str, place: str) -> OSError:
    if at := _NO_PLACE.match(place):
        return BadSource(cast("Reason", at[1]), "so its archive said when it was scanned")
    return OSError(f"{source!r} is no source that this version knows")


def _read_file(path: Path, most: int) -> bytes:
    with open_regular(path) as file:
        _refuse_above(most, os.fstat(file.fileno()).st_size)
        return file.read()


def _read_span(archive: str, offset: int, length: int) -> bytes:
    """A stretch of an archive, fewer bytes where it ends before."""
    if archive.endswith(GZIPPED):
        return gzip_of(Path(archive)).read_at(offset, length)
    with open_regular(archive) as file:
        if offset + length > os.fstat(file.fileno()).st_size:  # and a lie may be of any size
            return b""
        file.seek(offset)
        return file.read(length)
