"""Reads the headers of a tar, or of several concatenated ones, member by member.

tarfile parses each header. As a reader it would also load names of any size into memory, follow
negative sizes, and stop without an error at what it does not know.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from xlsd_cache.files.inflate import ReadAt

_BLOCK = tarfile.BLOCKSIZE
_HEADER_BYTES = 2**20  # of a long name, or of pax records: names, times, attributes
_ZEROS = 2**26  # bytes of padding after an end mark that are read
_PIECE = 2**20
_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, *_DEVICES)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)

Pax = dict[str, str]


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One member, by its headers."""

    name: str
    kind: str  # file | hardlink | sparse | folder | other
    offset: int  # of its content, in bytes
    size: int  # bytes
    link: str  # target of a hard link


class TarReader:
    """Iterates over the entries of a tar that `read_at` reads.

    After the last one, `damage` says why the rest was not read, and `trailing` is the byte from
    which on there is data that is no tar, or -1.
    """

    def __init__(self, read_at: ReadAt) -> None:
        self._read_at = read_at
        self._buffer = 0, b""  # offset and bytes read last while passing zeros
        self.damage, self.trailing, self.end = "", -1, 0
        self.last: TarEntry | None = None

    def __iter__(self) -> Iterator[TarEntry]:
        local: Pax = {}  # from headers before the member's own
        default: Pax = {}  # from global headers
        after_mark = False
        while block := self._header(after_mark):
            at = self.end
            if not any(block):
                if not self._pass_zeros():
                    return
                after_mark = True
                continue
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.TarError, ValueError):
                if after_mark:
                    self.trailing = at
                else:
                    self.damage = f"at byte {at} there is neither a member nor the end mark"
                return
            self.end += _BLOCK
            extends = info.type in _PAX or info.type in _NAMES
            fields = {} if extends else {**default, **local}
            try:
                size = _size(fields.get("size", info.size))
                if extends:
                    more = self._extended(info.type, size)
                    (default if info.type == tarfile.XGLTYPE else local).update(more)
                    continue
                if info.type == tarfile.GNUTYPE_SPARSE:
                    self._pass_map(block)
            except ValueError as error:
                self.damage, self.end = f"the header at byte {at} is damaged: {error}", at
                return
            local, after_mark = {}, False
            self.last = _entry(info, fields, self.end, size)
            yield self.last
            if info.type not in _WITHOUT_DATA:
                self.end += -(-size // _BLOCK) * _BLOCK

    def read_at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes; offsets never go far back."""
        start, data = self._buffer
        part = data[offset - start :][:count] if start <= offset < start + len(data) else b""
        if len(part) == count:
            return part
        return part + self._read_at(offset + len(part), count - len(part))

    def _header(self, after_mark: bool) -> bytes:
        """The next header block; empty at the end, with or without an end mark."""
        block = self.read_at(self.end, _BLOCK)
        if len(block) == _BLOCK:
            return block
        if not after_mark:
            self.damage = f"it ends at byte {self.end + len(block)} without an end mark"
        elif block.strip(b"\0"):
            self.trailing = self.end
        return b""

    def _pass_zeros(self) -> bool:
        """Skip to the first block that is not zeros; False where there is none."""
        start = self.end
        while self.end - start < _ZEROS:
            piece = self.read_at(self.end, _PIECE)
            self._buffer = self.end, piece
            zeros = len(piece) - len(piece.lstrip(b"\0"))
            if zeros < len(piece):
                self.end += zeros // _BLOCK * _BLOCK
                return True
            self.end += zeros
            if zeros < _PIECE:
                if self.end - start < 2 * _BLOCK:
                    self.damage = f"it ends at byte {self.end}, within its end mark"
                return False
        self.trailing = self.end
        return False

    def _extended(self, kind: bytes, size: int) -> Pax:
        """The fields that an extended header gives the next member. Raises ValueError."""
        if size > _HEADER_BYTES:
            raise ValueError(f"it claims {size} bytes of names")
        data = self.read_at(self.end, size)
        if len(data) < size:
            raise ValueError("it is cut off")
        self.end += -(-size // _BLOCK) * _BLOCK
        if kind in _NAMES:
            return {_NAMES[kind]: data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
        return _records(data)

    def _pass_map(self, block: bytes) -> None:
        """Skip the map of a sparse member, which may take further blocks."""
        extended = block[482]
        while extended:
            block = self.read_at(self.end, _BLOCK)
            if len(block) < _BLOCK:
                raise ValueError("it is cut off")
            extended = block[504]
            self.end += _BLOCK


def _size(value: str | int) -> int:
    """Raises ValueError for an impossible size."""
    size = int(value)
    if not 0 <= size < 2**62:
        raise ValueError(f"it claims {size} bytes")
    return size


def _records(data: bytes) -> Pax:
    """The pax records in a header: each is "LENGTH KEY=VALUE" and a newline. Raises ValueError."""
    records, at = {}, 0
    while at < len(data) and data[at]:
        blank = data.index(b" ", at, at + 20)
        length = int(data[at:blank])
        record = data[blank + 1 : at + length]
        if length <= blank - at or not record.endswith(b"\n"):
            raise ValueError("its pax records are damaged")
        key, _, value = record[:-1].decode("utf-8", "surrogateescape").partition("=")
        records[key] = value
        at += length
    return records


def _entry(info: tarfile.TarInfo, fields: Pax, offset: int, size: int) -> TarEntry:
    name = fields.get("GNU.sparse.name") or fields.get("path") or info.name
    kind = "other"
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in fields):
        kind = "sparse"
    elif info.type in _FILES:
        kind = "folder" if name.endswith("/") else "file"
    elif info.type == tarfile.LNKTYPE:
        kind = "hardlink"
    elif info.type == tarfile.DIRTYPE:
        kind = "folder"
    return TarEntry(name, kind, offset, size, fields.get("linkpath") or info.linkname)
