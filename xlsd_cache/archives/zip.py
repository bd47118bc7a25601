"""Reads the central directory of a zip, and checks each member's local header against it.

zipfile would load a directory of any size into memory, and stop at the first damaged member.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

STORED, DEFLATED = 0, 8  # methods
_TAIL = 2**16 + 22  # the end record, and the longest comment after it
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 1, 8, 2**11  # flags
_SIZES, _UNICODE_NAME = 0x0001, 0x7075  # extra fields
_SENTINEL = 0xFFFFFFFF  # the size is in an extra field


class NotAZip(Exception):
    """The file has no central directory."""


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One member, by the central directory."""

    name: str  # with slashes, whatever wrote it
    raw: bytes
    flags: int
    method: int
    crc: int
    packed: int  # bytes
    size: int  # bytes, inflated
    offset: int  # of its local header

    @property
    def is_encrypted(self) -> bool:
        """Whether a password is needed."""
        return bool(self.flags & _ENCRYPTED)


class ZipReader:
    """Iterates over the central directory of an open file. Raises NotAZip.

    After the last entry, `damage` says what could not be read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.damage = file, ""
        self.length = file.seek(0, os.SEEK_END)
        self._count, nbytes, offset, self._stop = self._end()
        self._start = self._stop - nbytes
        self.before = self._start - offset  # bytes that precede the zip in the file
        if self._start < 0 or self.before < 0:
            raise NotAZip("its table is not where its end says")

    def __iter__(self) -> Iterator[ZipEntry]:
        at, count = self._start, 0
        while at < self._stop:
            self._file.seek(at)
            head = self._file.read(_ENTRY.size)
            if len(head) < _ENTRY.size or not head.startswith(b"PK\1\2"):
                self.damage = f"its table is damaged after {count} of {self._count} members"
                return
            fields = _ENTRY.unpack(head)
            lengths = fields[10:13]  # of name, extra fields, comment
            at += _ENTRY.size + sum(lengths)
            name = self._file.read(lengths[0])
            extra = self._file.read(lengths[1])
            count += 1
            yield self._entry(fields, name, extra)
        if (count - self._count) % 2**16:  # some programs write it modulo 65536
            self.damage = f"its table has {count} members, and its end says {self._count}"

    def place(self, entry: ZipEntry) -> int:
        """Offset of the member's content.

        Raises ValueError where the local header is missing or contradicts the directory. The log
        has its text as the image's detail, so it must not change.
        """
        self._file.seek(min(entry.offset, self.length))
        head = self._file.read(_LOCAL.size)
        if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
            raise ValueError("it is not where the table says")
        _, _, flags, method, _, _, crc, packed, size, *lengths = _LOCAL.unpack(head)
        name = self._file.read(lengths[0])
        if _slashed(name) != _slashed(entry.raw):
            raise ValueError("its own header has another name than the table")
        if (flags ^ entry.flags) & _ENCRYPTED or method != entry.method:
            raise ValueError("its own header and the table name two ways of packing it")
        pairs = [(crc, entry.crc), (packed, entry.packed), (size, entry.size)]
        is_given = any(mine for mine, _ in pairs) and not flags & _SIZES_FOLLOW
        if is_given and any(mine not in (theirs, _SENTINEL) for mine, theirs in pairs):
            raise ValueError("its own header has another size or crc32 than the table")
        if entry.method == STORED and entry.packed != entry.size:
            raise ValueError("the table gives two sizes for what is not compressed")
        return entry.offset + _LOCAL.size + int(sum(lengths))

    def _entry(self, fields: tuple[int, ...], raw: bytes, extra: bytes) -> ZipEntry:
        flags, method, crc, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
        offset = fields[16]
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437", "surrogateescape")
        for kind, data in _extras(extra):
            if kind == _SIZES:
                size, packed, offset = _long(data, size, packed, offset)
            elif kind == _UNICODE_NAME and data[1:5] == zlib.crc32(raw).to_bytes(4, "little"):
                name = data[5:].decode("utf-8", "surrogateescape")
        name = name.partition("\0")[0].replace("\\", "/")
        return ZipEntry(name, raw, flags, method, crc, packed, size, offset + self.before)

    def _end(self) -> tuple[int, int, int, int]:
        """Number of members, size and offset of the directory, and the offset of its end."""
        start = max(0, self.length - _TAIL)
        self._file.seek(start)
        tail = self._file.read(_TAIL)
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) < at + _END.size:
            raise NotAZip("no table of members is at its end")
        fields = _END.unpack_from(tail, at)
        end = start + at
        return self._end64(end) or (fields[4], fields[5], fields[6], end)

    def _end64(self, end: int) -> tuple[int, int, int, int] | None:
        """The same for zip64, whose end record lies before `end`."""
        if end < _LOCATOR.size + _END64.size:
            return None
        self._file.seek(end - _LOCATOR.size)
        signature, _, offset, _ = _LOCATOR.unpack(self._file.read(_LOCATOR.size))
        if signature != b"PK\6\7":
            return None
        for at in (end - _LOCATOR.size - _END64.size, offset):
            self._file.seek(min(at, self.length))
            head = self._file.read(_END64.size)
            if len(head) == _END64.size and head.startswith(b"PK\6\6"):
                fields = _END64.unpack(head)
                return fields[7], fields[8], fields[9], at
        raise NotAZip("its zip64 table has no end")


def _slashed(name: bytes) -> bytes:
    return name.replace(b"\\", b"/")


def _extras(extra: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        yield kind, extra[at + 4 : at + 4 + length]
        at += 4 + length


def _long(data: bytes, *values: int) -> tuple[int, ...]:
    """The values; those that do not fit into 32 bits come from an extra field."""
    values64, at = [], 0
    for value in values:
        if value == _SENTINEL and at + 8 <= len(data):
            value = int.from_bytes(data[at : at + 8], "little")  # noqa: PLW2901
            at += 8
        values64.append(value)
    return tuple(values64)
