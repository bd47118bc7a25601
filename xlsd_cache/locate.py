"""Source string -> bytes: an image file, or the stretch of an archive that holds one.

A source is a path, or `ARCHIVE//PLACE/NAME`. No path of ours has an empty part, so the two cannot
be mistaken. PLACE says all that reading needs: nothing is indexed first, a tar member costs one
read, and any number of threads and processes may read at once.

    photos/a.jpg                          a file
    shards/00000.tar//1536+48211/0.jpg    the 48211 bytes at 1536
    photos.zip//4096+3000~5120/a.bmp      the 3000 bytes at 4096, which inflate to 5120
    photos.parquet//image@17+48211/a.jpg  column `image`, row 17, 48211 bytes
"""

import io
import os
import re
import zlib
from bisect import bisect_right
from collections import OrderedDict
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BETWEEN = "//"
_SPAN = re.compile(r"(\d+)\+(\d+)(?:~(\d+))?/", re.DOTALL)
_CELL = re.compile(r"([^/]+)@(\d+)\+(\d+)/", re.DOTALL)
_HELD_BYTES = 2**29  # of decoded parquet row groups: rows of one group are read in any order


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


def span(archive: Path, offset: int, length: int, name: str, inflated: int | None = None) -> str:
    """The source of an archive's member; `inflated` is its size where it is deflated."""
    size = "" if inflated is None else f"~{inflated}"
    return f"{archive}{BETWEEN}{offset}+{length}{size}/{name}"


def cell(table: Path, column: str, row: int, size: int, name: str) -> str:
    """The source of the image in one cell of a parquet file; `column` may be dotted."""
    return f"{table}{BETWEEN}{column}@{row}+{size}/{name}"


def read_source(source: str) -> bytes:
    """All bytes of the image. Raises OSError; FileNotFoundError where file or archive is gone."""
    archive, _, place = source.partition(BETWEEN)
    if not place:
        return Path(source).read_bytes()
    if at := _SPAN.match(place):
        with Path(archive).open("rb") as file:
            file.seek(int(at[1]))
            data = file.read(int(at[2]))
        if len(data) < int(at[2]):
            raise OSError(f"{archive} ends before {place}")
        return data if at[3] is None else _inflate(data, int(at[3]))
    if at := _CELL.match(place):
        return _read_cell(archive, at[1], int(at[2]))
    raise OSError(f"{source!r} is no source that this version knows")


def open_source(source: str) -> IO[bytes]:
    """The image as a file to read from, without reading all of it where that can be helped.

    Raises OSError like `read_source`.
    """
    archive, _, place = source.partition(BETWEEN)
    if not place:
        return Path(source).open("rb")
    at = _SPAN.match(place)
    if at and at[3] is None:
        return io.BufferedReader(_Stretch(Path(archive), int(at[1]), int(at[2])), 16384)
    return io.BytesIO(read_source(source))


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
    raise OSError(f"{source!r} is no source that this version knows")


def descend(table: pa.Table, column: str) -> pa.ChunkedArray:
    """The column called `column`, or the field of a struct column that its dots lead to."""
    if column in table.column_names:
        return table[column]
    head, *rest = column.split(".")
    values = table[head]
    for name in rest:
        values = pc.struct_field(values, name)
    return values


def _inflate(data: bytes, size: int) -> bytes:
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflated = inflater.decompress(data, size + 1)  # more than it says is damage as well
    except zlib.error as error:
        raise OSError(f"damaged in its archive: {error}") from error
    if len(inflated) != size:
        raise OSError(f"damaged in its archive: {len(inflated)} bytes and not {size}")
    return inflated


class _Stretch(io.RawIOBase):
    """A part of a file that reads like a file of its own."""

    def __init__(self, archive: Path, offset: int, length: int) -> None:
        self._file = archive.open("rb", buffering=0)
        self._offset, self._length, self._at = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


_groups: OrderedDict[tuple[str, Stat, str, int], Any] = OrderedDict()
_lock = Lock()


def _read_cell(path: str, column: str, row: int) -> bytes:
    """One value of a parquet file, whose whole row group is decoded and kept for the next."""
    version = Stat.of(Path(path).stat())
    try:
        starts = _row_groups(path, version)
        group = bisect_right(starts, row) - 1
        named = (path, version, column, group)
        with _lock:
            if named not in _groups:
                with pq.ParquetFile(path) as file:
                    _groups[named] = descend(file.read_row_group(group, columns=[column]), column)
                while len(_groups) > 1 and sum(g.nbytes for g in _groups.values()) > _HELD_BYTES:
                    _groups.popitem(last=False)
            _groups.move_to_end(named)
            values = _groups[named]
        value = values[row - starts[group]].as_py()
    except (pa.ArrowException, KeyError, IndexError) as error:
        raise OSError(f"cannot read {column} of row {row}: {error}") from error
    if not isinstance(value, bytes):
        raise OSError(f"{column} of row {row} holds no bytes")
    return value


@lru_cache(maxsize=4096)
def _row_groups(path: str, version: Stat) -> list[int]:
    """The first row of each row group of that version of the file, and their end."""
    del version  # only tells the versions of a file apart
    with pq.ParquetFile(path) as file:
        told = file.metadata
        return [0, *accumulate(told.row_group(i).num_rows for i in range(told.num_row_groups))]
