"""Reads and writes one shard: an uncompressed zarr v3 shard file, records with an index at the end.

    offset 0     record, record, ...      each: the latent's bytes, then their crc32c (uint32 LE)
    EOF-16R-4    index: R x {uint64 LE offset, uint64 LE nbytes}; a missing row is (2^64-1, 2^64-1)
    EOF-4        crc32c of the index (uint32 LE)

This is the byte layout of zarr's `sharding_indexed` codec (zarr-specs, codecs/sharding-indexed)
with inner chunks of one sample and the codecs [bytes little, crc32c] for both data and index.
Records may be in any order: rows are found through the index.
"""

import json
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from xlsd_cache.runtime.atomic import fsync_folder, write_bytes
from xlsd_cache.runtime.bounded_files import parse_json

MISSING = 2**64 - 1  # offset and length of a row that the shard does not hold
CRC_NBYTES = 4
Fault = Literal[
    "index",  # missing, damaged, or of another layout: no row can be read
    "missing",  # the index has no such row
    "truncated",  # the file ends within the row
    "checksum",  # the row's bytes do not have their crc32c
]


class CorruptShard(Exception):
    """A shard file that contradicts its index or checksums."""

    def __init__(self, path: Path, fault: Fault, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.fault, self.message = fault, message


@dataclass(frozen=True)
class ShardRow:
    """The outcome of one planned row: a latent's crc32c, or the reason why there is none."""

    slot: int  # row within the shard
    content_hash: str  # sha256 of the image file; empty where it could not be read
    crc32c: int | None = None
    reason: str = ""
    detail: str = ""

    @property
    def is_sound(self) -> bool:
        """Whether each value has its type; in a damaged journal it may not."""
        texts = self.content_hash, self.reason, self.detail
        crc = self.crc32c is None or (type(self.crc32c) is int and 0 <= self.crc32c < 2**32)
        return crc and type(self.slot) is int and all(isinstance(text, str) for text in texts)


class ShardReader:
    """Random access to the rows of one complete shard, from any number of threads."""

    def __init__(self, path: Path, rows: int, nbytes: int) -> None:
        """Open a shard of `rows` rows of `nbytes` bytes each.

        Raises OSError, and CorruptShard where the index is missing, damaged or of another size.
        """
        self.path, self.nbytes = path, nbytes
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        self._fd = os.open(path, flags)  # does not block on a pipe
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise CorruptShard(path, "index", "not a regular file")
            self.offsets = self._read_index(rows)
        except BaseException:
            self.close()
            raise

    def read_into(self, slot: int, out: NDArray[np.uint8]) -> None:
        """Read the latent of row `slot` into `out`, contiguous uint8 [nbytes], and verify it.

        Raises CorruptShard where the row is missing or truncated, or its checksum is wrong.
        """
        offset = self.offsets.item(slot)
        if offset == MISSING:
            raise CorruptShard(self.path, "missing", f"row {slot} is not in the shard")
        crc = bytearray(CRC_NBYTES)
        got = self._pread_into(out, crc, offset)
        if got != self.nbytes + CRC_NBYTES:
            message = f"row {slot} is cut short at byte {offset + got}"
            raise CorruptShard(self.path, "truncated", message)
        if google_crc32c.value(out) != int.from_bytes(crc, "little"):
            raise CorruptShard(self.path, "checksum", f"row {slot} has a wrong crc32c")

    def will_need(self, slot: int) -> None:
        """Hint the kernel to read row `slot` ahead of time, where the system takes hints."""
        offset = self.offsets.item(slot)
        if hasattr(os, "posix_fadvise") and offset != MISSING:
            length = self.nbytes + CRC_NBYTES
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:  # for shards that the store's cache drops
        if hasattr(self, "_fd"):
            self.close()

    def _pread_into(self, out: NDArray[np.uint8], crc: bytearray, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [out.data, crc], offset)
        # Windows has no preadv; with a handle per call, threads do not interfere.
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            got = file.readinto(out.data)
            return got + file.readinto(crc) if got == self.nbytes else got

    def _read_index(self, rows: int) -> NDArray[np.uint64]:
        length = 16 * rows + CRC_NBYTES
        size = os.fstat(self._fd).st_size
        if size < length:
            raise self._bad_index(f"{size} bytes cannot hold an index of {rows} rows")
        os.lseek(self._fd, size - length, os.SEEK_SET)
        data = os.read(self._fd, length)
        if google_crc32c.value(data[:-CRC_NBYTES]) != int.from_bytes(data[-CRC_NBYTES:], "little"):
            raise self._bad_index("its index has a wrong crc32c; the file is damaged")
        index = np.frombuffer(data[:-CRC_NBYTES], "<u8").reshape(rows, 2)
        offsets = index[:, 0].astype(np.uint64)
        present = offsets != MISSING
        if (index[present, 1] != self.nbytes + CRC_NBYTES).any():
            raise self._bad_index(f"its records are not of {self.nbytes} + 4 bytes")
        if (offsets[present] > size - length - self.nbytes - CRC_NBYTES).any():
            raise self._bad_index("its index points beyond its records")
        return offsets

    def _bad_index(self, message: str) -> CorruptShard:
        return CorruptShard(self.path, "index", message)


def index_of(slots: Sequence[int], rows: int, nbytes: int) -> bytes:
    """The index of a shard of `rows` rows whose records are those of `slots`, in that order."""
    index = np.full((rows, 2), MISSING, "<u8")
    length = nbytes + CRC_NBYTES
    index[list(slots), 0] = np.arange(len(slots)) * length
    index[list(slots), 1] = length
    data = index.tobytes()
    return data + struct.pack("<I", google_crc32c.value(data))


def _journal_lines(rows: Iterable[ShardRow]) -> bytes:
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()


def read_journal(path: Path) -> dict[int, ShardRow]:
    """The rows that a journal lists, up to the first incomplete or damaged line."""
    rows: dict[int, ShardRow] = {}
    if not path.exists():
        return rows
    for line in path.read_bytes().split(b"\n")[:-1]:  # a torn last line has no newline
        try:
            row = ShardRow(**parse_json(line))
        except (ValueError, TypeError):
            break
        if not row.is_sound:
            break
        rows[row.slot] = row
    return rows


class ShardWriter:
    """Writes one shard in staging batch by batch, so that a kill costs at most one batch.

    A batch's data is appended to NAME.part, then a line per row to the journal NAME.jnl. Reopening
    keeps the longest run of whole batches that the journal lists and whose checksums hold, and
    truncates the rest. `batches` are the slots of each planned batch: batches are always encoded
    whole, so a resumed shard is byte-equal to an uninterrupted one.
    """

    def __init__(
        self, staging: Path, name: str, batches: Sequence[Sequence[int]], nbytes: int
    ) -> None:
        self.part, self.journal = staging / f"{name}.part", staging / f"{name}.jnl"
        self._batches, self._nbytes = batches, nbytes
        self.rows: dict[int, ShardRow] = {}
        self._salvage()

    @property
    def remaining(self) -> list[Sequence[int]]:
        """The batches that are not written yet, in order."""
        return [batch for batch in self._batches if batch[0] not in self.rows]

    def append(self, rows: Sequence[ShardRow], latents: Mapping[int, NDArray[Any]]) -> None:
        """Write one batch; `latents` has the array [C, h, w] of every row that is not rejected."""
        data, written = [], []
        for row in rows:
            crc = None
            if row.slot in latents:
                latent = np.ascontiguousarray(latents[row.slot]).reshape(-1).view(np.uint8)
                crc = google_crc32c.value(latent)
                data += [latent.tobytes(), struct.pack("<I", crc)]
            written.append(replace(row, crc32c=crc))
        with self.part.open("ab") as file:
            file.write(b"".join(data))
        with self.journal.open("ab") as file:  # after the data: a line implies its record
            file.write(_journal_lines(written))
        self.rows |= {row.slot: row for row in written}

    def finish(self, final: Path, rows: int) -> None:
        """Append the index, sync, and move the shard to `final`. The journal stays."""
        # in the order in which they were written
        slots = [row.slot for row in self.rows.values() if row.crc32c is not None]
        with self.part.open("ab") as file:
            # removes an index that a killed run appended
            file.truncate(len(slots) * (self._nbytes + CRC_NBYTES))
            file.write(index_of(slots, rows, self._nbytes))
            file.flush()
            os.fsync(file.fileno())
        self.part.replace(final)
        fsync_folder(final.parent)

    def discard(self) -> None:
        """Remove the staging files: after the commit, or to start again."""
        self.part.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)
        self.rows.clear()

    def _salvage(self) -> None:
        if not self.part.exists():
            self.journal.unlink(missing_ok=True)
            return
        journaled = read_journal(self.journal)
        with self.part.open("r+b") as file:
            for batch in self._batches:
                rows = [journaled[slot] for slot in batch if slot in journaled]
                if len(rows) < len(batch) or not all(self._verified(file, row) for row in rows):
                    break
                self.rows |= {row.slot: row for row in rows}
            held = sum(row.crc32c is not None for row in self.rows.values())
            file.truncate(held * (self._nbytes + CRC_NBYTES))
        write_bytes(self.journal, _journal_lines(self.rows.values()))

    def _verified(self, file: Any, row: ShardRow) -> bool:
        """Whether the file's next record is this row's; rejected rows have none."""
        if row.crc32c is None:
            return True
        record = file.read(self._nbytes + CRC_NBYTES)
        return (
            len(record) == self._nbytes + CRC_NBYTES
            and google_crc32c.value(record[:-CRC_NBYTES]) == row.crc32c
            and int.from_bytes(record[-CRC_NBYTES:], "little") == row.crc32c
        )
