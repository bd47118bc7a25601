"""Random access to the content of a gzip file, by access points from which to inflate.

An access point is a copy of zlib's state (about 48 KB), kept every few MiB. Unlike indexed_gzip,
this reports where a stream is truncated, where its crc32 or length is wrong, and trailing bytes.
"""

import zlib
from bisect import bisect_right
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import IO, Any

from xlsd_cache.files.inflate import BadSource

_FED = 2**15  # bytes of the file to inflate at once
_PIECE = 2**18  # the most inflated bytes at once
_SPACING = 2**22  # inflated bytes between access points; doubled in a file with too many
_MOST_POINTS = 4096  # access points of all files together: 200 MB
_RESTING = 64  # idle cursors of all files: so many threads can continue where they stopped
_ZEROS = 2**26  # bytes of padding after a gzip member to skip at most
_MAGIC = b"\x1f\x8b\x08"
END, CUT = "ended", "cut off"  # how a stream ends
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT = 2, 4, 8, 16
_NAME_BYTES = 2**16  # of a name or comment in a header: with more it is not gzip


@dataclass(frozen=True, slots=True)
class _AccessPoint:
    """A state of the inflater, from which to continue."""

    out: int  # inflated bytes before it
    at: int  # offset in the file of the next byte to inflate
    inflater: Any = None  # zlib.decompressobj; None between two members of the gzip file
    begun: int = 0  # where this gzip member starts, in inflated bytes
    crc: int = 0  # of this gzip member so far


@dataclass
class Gzip:
    """A gzip file and its access points, which reading creates."""

    path: Path
    spacing: int = _SPACING
    points: list[_AccessPoint] = field(default_factory=lambda: [_AccessPoint(0, 0)])
    lock: Lock = field(default_factory=Lock)

    def read_at(self, offset: int, count: int) -> bytes:
        """Inflated bytes, fewer at the end of the stream. Raises BadSource and OSError."""
        cursor = self._nearest(offset)
        with self.path.open("rb", buffering=0) as file:
            cursor.file = file
            data = cursor.read_at(offset, count)
        with _lock:
            _resting.append(cursor)
            del _resting[:-_RESTING]
        if len(data) < count and cursor.ending not in (END, CUT):
            raise BadSource("corrupt", f"its gzip stream is {cursor.ending}")
        return data

    def cursor(self, file: IO[bytes]) -> "Cursor":
        """A cursor at the start, which reads the open file."""
        return Cursor(self, _AccessPoint(0, 0), file)

    def keep(self, state: _AccessPoint) -> None:
        """Keep the state as an access point, if it is far enough after the last one."""
        with self.lock:
            if state.out < self.points[-1].out + self.spacing:
                return
            self.points.append(replace(state, inflater=state.inflater and state.inflater.copy()))
        _thin()

    def thin(self) -> None:
        """Keep every second access point."""
        with self.lock:
            self.spacing *= 2
            self.points = self.points[::2]

    def _nearest(self, offset: int) -> "Cursor":
        """The nearest cursor before `offset`: an idle one, or a new one at an access point."""
        with self.lock:
            point = self.points[bisect_right(self.points, offset, key=lambda point: point.out) - 1]
        with _lock:
            near = [c for c in _resting if c.gzip is self and point.out <= c.start <= offset]
            if near:
                cursor = max(near, key=lambda c: c.start)
                _resting.remove(cursor)
                return cursor
        return Cursor(self, point)


class Cursor:
    """Inflates forward from an access point, and records damage.

    `file` must be open while reading. `ending` is empty until the end of the stream is reached.
    """

    def __init__(self, gzip: Gzip, point: _AccessPoint, file: IO[bytes] | None = None) -> None:
        self.file = file
        self.bad: list[tuple[int, int]] = []  # inflated ranges whose checksum is wrong
        self.ending = ""  # END, CUT or a description of the damage
        self.behind = 0  # bytes after the last gzip member that are not gzip
        self.gzip, self._piece = gzip, b""
        self._state = replace(point, inflater=point.inflater and point.inflater.copy())

    @property
    def start(self) -> int:
        """The first inflated byte that can still be read."""
        return self._state.out - len(self._piece)

    def read_at(self, offset: int, count: int) -> bytes:
        """Bytes from `offset`, at or after `start`; fewer at the end of the stream."""
        assert offset >= self.start
        parts, wanted = [], count
        while wanted > 0:
            skipped = self._piece[max(0, offset - self.start) :]
            if offset < self._state.out:
                parts.append(skipped[:wanted])
                offset += len(parts[-1])
                wanted -= len(parts[-1])
            if wanted and not self._advance():
                break
        return b"".join(parts)

    def drain(self, most: int) -> int:
        """Inflate to the end, or at most `most` bytes; returns the inflated offset reached."""
        end = self._state.out + most
        while self._state.out < end and self._advance():
            pass
        return self._state.out

    def _advance(self) -> bool:
        """Inflate the next piece; False at the end of the stream."""
        while not self.ending:
            if self._state.inflater is None and not self._begin():
                return False
            if self._inflate():
                self.gzip.keep(self._state)
                return True
        return False

    def _begin(self) -> bool:
        """Read the header of the next gzip member, if there is one."""
        assert self.file is not None
        at = self._state.at
        self.file.seek(at)
        head = self.file.read(_FED)
        if at:
            while head and at < self._state.at + _ZEROS and not head.strip(b"\0"):  # padding
                at += len(head)
                head = self.file.read(_FED)
            at += len(head) - len(head.lstrip(b"\0"))
        length = _header_length(self.file, at) if head else 0
        if not length:
            self.ending, end = END, self.file.seek(0, 2)
            self.behind = end - at if head else 0
            return False
        if length < 0:
            self.ending = CUT
            return False
        out = self._state.out
        self._state = _AccessPoint(out, at + length, zlib.decompressobj(-zlib.MAX_WBITS), out, 0)
        return True

    def _inflate(self) -> bool:
        """Feed the inflater once; False if it returned nothing."""
        assert self.file is not None
        state, inflater = self._state, self._state.inflater
        self.file.seek(state.at)
        fed = self.file.read(_FED)
        try:
            piece = inflater.decompress(fed, _PIECE)
        except zlib.error as error:
            self.ending = f"damaged: {error}"
            self._spoil(state.begun, state.out + _PIECE)
            return False
        if not fed and not piece:
            self.ending = CUT
            return False
        left = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        at = state.at + len(fed) - len(left)
        out, crc = state.out + len(piece), zlib.crc32(piece, state.crc)
        self._piece, self._state = piece, _AccessPoint(out, at, inflater, state.begun, crc)
        if inflater.eof:
            self._end_member()
        return bool(piece)

    def _spoil(self, begun: int, end: int) -> None:
        if self.bad and self.bad[-1][1] >= begun:
            begun, _ = self.bad.pop()
        self.bad.append((begun, end))

    def _end_member(self) -> None:
        """Compare the gzip member's crc32 and length with the inflated bytes."""
        assert self.file is not None
        state = self._state
        self.file.seek(state.at)
        trailer = self.file.read(8)
        told = int.from_bytes(trailer[:4], "little"), int.from_bytes(trailer[4:], "little")
        if len(trailer) < 8:
            self.ending = CUT
        elif told != (state.crc, (state.out - state.begun) % 2**32):
            self._spoil(state.begun, state.out)
        self._state = _AccessPoint(state.out, state.at + 8)


def _header_length(file: IO[bytes], at: int) -> int:
    """Length of the gzip header at `at`; 0 if there is none, -1 if the file ends within it."""
    file.seek(at)
    head = file.read(3 * _NAME_BYTES)
    if head[:3] != _MAGIC:
        return -1 if at == 0 and len(head) < 3 and _MAGIC.startswith(head) else 0
    if len(head) < 10:
        return -1
    length, flags = 10, head[3]
    if flags & _FEXTRA:
        length += 2 + int.from_bytes(head[10:12], "little")
    for flag in (_FNAME, _FCOMMENT):
        if flags & flag:
            end = head.find(b"\0", length, length + _NAME_BYTES)
            if end < 0:
                return -1 if length + _NAME_BYTES > len(head) else 0
            length = end + 1
    length += 2 if flags & _FHCRC else 0
    return length if length <= len(head) else -1


_files: OrderedDict[tuple[str, int, int], Gzip] = OrderedDict()
_resting: list[Cursor] = []
_lock = Lock()


def gzip_of(path: Path) -> Gzip:
    """The gzip file, with the access points that this process has kept. Raises OSError."""
    status = path.stat()
    key = str(path), status.st_size, status.st_mtime_ns
    with _lock:
        gzip = _files.setdefault(key, Gzip(path))
        _files.move_to_end(key)
        while len(_files) > _MOST_POINTS:
            _files.popitem(last=False)
    return gzip


def _thin() -> None:
    """If all files together have too many access points, halve those of the densest file."""
    with _lock:
        files = list(_files.values())
    if sum(len(file.points) for file in files) > _MOST_POINTS:
        with suppress(ValueError):  # another thread did it
            min((f for f in files if len(f.points) > 1), key=lambda f: f.spacing).thin()
