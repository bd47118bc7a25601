"""The members of a tar, or of several after one another, in the order in which they are.

tarfile reads the headers; it would also read names of any size into memory, follow sizes backwards,
and stop in silence at what it does not know.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from xlsd_cache.files.inflate import ReadAt

_BLOCK = tarfile.BLOCKSIZE
_HEADER_BYTES = 2**20  # of a long name, or of pax records: names, times, attributes
_ZEROS = 2**26  # bytes of padding behind an end mark that are read
_PIECE = 2**20
_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, *_DEVICES)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)

Pax = dict[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One member as its headers tell it."""

    name: str
    kind: str  # file | hardlink | sparse | folder | other
    offset: int  # of its content
    size: int
    link: str  # what a hard link leads to


class Tar:
    """The entries of what `read_at` reads.

    Once they are through, `damage` says why what follows was not read, and `behind` from which byte
    on there is something that is no tar, or -1.
    """

    def __init__(self, read_at: ReadAt) -> None:
        self._read_at = read_at
        self._held = 0, b""  # where zeros were read, and what followed them
        self.damage, self.behind, self.end = "", -1, 0
        self.last: Entry | None = None

    def __iter__(self) -> Iterator[Entry]:
        told: Pax = {}  # by headers before the member's own
        always: Pax = {}
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
                    self.behind = at
                else:
                    self.damage = f"at byte {at} there is neither a member nor the end mark"
                return
            self.end += _BLOCK
            before = info.type in _PAX or info.type in _NAMES
            own = {} if before else {**always, **told}
            try:
                size = _size(own.get("size", info.size))
                if before:
                    said = self._before(info.type, size)
                    (always if info.type == tarfile.XGLTYPE else told).update(said)
                    continue
                if info.type == tarfile.GNUTYPE_SPARSE:
                    self._pass_map(block)
            except ValueError as error:
                self.damage, self.end = f"the header at byte {at} is damaged: {error}", at
                return
            told, after_mark = {}, False
            self.last = _entry(info, own, self.end, size)
            yield self.last
            if info.type not in _WITHOUT_DATA:
                self.end += -(-size // _BLOCK) * _BLOCK

    def read_at(self, offset: int, count: int) -> bytes:
        """What is there, fewer bytes at the end; never far before what was read last."""
        at, held = self._held
        part = held[offset - at :][:count] if at <= offset < at + len(held) else b""
        if len(part) == count:
            return part
        return part + self._read_at(offset + len(part), count - len(part))

    def _header(self, after_mark: bool) -> bytes:
        """The next block; empty at the end, with or without an end mark."""
        block = self.read_at(self.end, _BLOCK)
        if len(block) == _BLOCK:
            return block
        if not after_mark:
            self.damage = f"it ends at byte {self.end + len(block)} without an end mark"
        elif block.strip(b"\0"):
            self.behind = self.end
        return b""

    def _pass_zeros(self) -> bool:
        """Go on to the first block that is not zeros; False where there is none."""
        begun = self.end
        while self.end - begun < _ZEROS:
            piece = self.read_at(self.end, _PIECE)
            self._held = self.end, piece
            zeros = len(piece) - len(piece.lstrip(b"\0"))
            if zeros < len(piece):
                self.end += zeros // _BLOCK * _BLOCK
                return True
            self.end += zeros
            if zeros < _PIECE:
                if self.end - begun < 2 * _BLOCK:
                    self.damage = f"it ends at byte {self.end}, within its end mark"
                return False
        self.behind = self.end
        return False

    def _before(self, kind: bytes, size: int) -> Pax:
        """What a header says of the member that follows it. Raises ValueError."""
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
        """Go on behind the map of a sparse member, which may take further blocks."""
        extended = block[482]
        while extended:
            block = self.read_at(self.end, _BLOCK)
            if len(block) < _BLOCK:
                raise ValueError("it is cut off")
            extended = block[504]
            self.end += _BLOCK


def _size(told: str | int) -> int:
    """Raises ValueError for what no member's size can be."""
    size = int(told)
    if not 0 <= size < 2**62:
        raise ValueError(f"it claims {size} bytes")
    return size


def _records(data: bytes) -> Pax:
    """The pax records in a header: each its own length, a blank, a key, `=`, a value, a line end.

    Raises ValueError for what is no such thing.
    """
    found, at = {}, 0
    while at < len(data) and data[at]:
        blank = data.index(b" ", at, at + 20)
        length = int(data[at:blank])
        record = data[blank + 1 : at + length]
        if length <= blank - at or not record.endswith(b"\n"):
            raise ValueError("its pax records are damaged")
        key, _, value = record[:-1].decode("utf-8", "surrogateescape").partition("=")
        found[key] = value
        at += length
    return found


def _entry(info: tarfile.TarInfo, told: Pax, offset: int, size: int) -> Entry:
    name = told.get("GNU.sparse.name") or told.get("path") or info.name
    kind = "other"
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in told):
        kind = "sparse"
    elif info.type in _FILES:
        kind = "folder" if name.endswith("/") else "file"
    elif info.type == tarfile.LNKTYPE:
        kind = "hardlink"
    elif info.type == tarfile.DIRTYPE:
        kind = "folder"
    return Entry(name, kind, offset, size, told.get("linkpath") or info.linkname)
