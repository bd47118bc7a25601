"""Claims a shard for one process by a lock, and commits it by writing its record."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
from filelock import BaseFileLock, FileLock, Timeout

from xlsd_cache.runtime.atomic import sweep, write_parquet
from xlsd_cache.schema import COMMIT, PlanEntry
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.shard import CorruptShard, ShardRow, ShardWriter, read_journal
from xlsd_cache.store.view import StoreView

log = logging.getLogger("xlsd.cache.store")


@dataclass
class Claim:
    """A shard that only this process writes, until `finish` or `release`.

    The kernel releases the lock of a killed process; the next one resumes from the journal.
    """

    unit: ShardId
    entries: dict[int, PlanEntry]  # slot -> plan entry
    store: StoreView
    lock: BaseFileLock
    writer: ShardWriter

    def finish(self) -> None:
        """Move the shard into place, then write its commit record.

        Readers look at a shard only once its record exists.
        """
        manifest = self.store.manifest
        self.writer.finish(manifest.shard(self.unit), self.store.rows_per_shard)
        write_commit(self.store, self.unit, self.entries, self.writer.rows)
        self.writer.discard()
        _drop(manifest, self.unit, self.lock)

    def release(self) -> None:
        """Give up the lock; this or another process can resume the shard."""
        self.lock.release()


def claim(
    store: StoreView, unit: ShardId, planned: Callable[[ShardId], dict[int, PlanEntry]], batch: int
) -> Claim | None:
    """Claim `unit` for this process; None if another process holds it or it is committed.

    `planned` makes the unit's planned rows by slot, and is called only once the unit is locked. A
    shard left in place by a process that was killed before its commit is committed if every
    checksum holds, else written again.
    """
    manifest = store.manifest
    lock = FileLock(lock_path(manifest, unit), blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    try:
        if manifest.commit(unit).exists():
            _drop(manifest, unit, lock)
            return None
        entries = planned(unit)
        final = manifest.shard(unit)
        journal = manifest.staging / f"{unit.name}.jnl"
        if final.exists():
            rows = read_journal(journal)
            if rows.keys() >= entries.keys() and _holds(store, unit, rows):
                write_commit(store, unit, entries, rows)
                journal.unlink(missing_ok=True)  # another process may tidy up now
                _drop(manifest, unit, lock)
                return None
            final.unlink()  # never committed, so never read
        batches, nbytes = _batches(sorted(entries), batch), store.identity.nbytes(unit.bucket)
        writer = ShardWriter(manifest.staging, unit.name, batches, nbytes)
        return Claim(unit, entries, store, lock, writer)
    except BaseException:
        lock.release()
        raise


@contextmanager
def planning(manifest: Manifest) -> Iterator[None]:
    """Hold the lock for adding a generation; logs when it has to wait."""
    lock = FileLock(manifest.staging / "plan.lock", thread_local=False)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.info("another process is planning; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def tidy(manifest: Manifest) -> None:
    """Remove what processes killed between commit and clean-up left in staging."""
    committed = {unit.name for unit in manifest.committed()}
    for path in manifest.staging.iterdir():
        if path.stem in committed and path.suffix in (".part", ".jnl", ".lock"):
            path.unlink(missing_ok=True)
    sweep(manifest.staging)


def lock_path(manifest: Manifest, unit: ShardId) -> Path:
    """The lock for writing the unit's shard or commit record."""
    return manifest.staging / f"{unit.name}.lock"


def _drop(manifest: Manifest, unit: ShardId, lock: BaseFileLock) -> None:
    """Release a committed unit's lock and remove the file.

    Safe only after the commit: a process that locks the removed file finds nothing to do.
    """
    lock_path(manifest, unit).unlink(missing_ok=True)
    lock.release()


def _batches(slots: Sequence[int], batch: int) -> list[list[int]]:
    """The slots grouped by slot // batch: fixed by the plan, not by where a run was killed."""
    grouped: dict[int, list[int]] = {}
    for slot in slots:
        grouped.setdefault(slot // batch, []).append(slot)
    return list(grouped.values())


def _holds(store: StoreView, unit: ShardId, rows: dict[int, ShardRow]) -> bool:
    """Whether the shard holds the latents that its journal lists."""
    out = np.empty(store.identity.nbytes(unit.bucket), np.uint8)
    try:
        reader = store.open_shard(unit)
        for row in rows.values():
            if row.crc32c is not None:
                reader.read_into(row.slot, out)
                if google_crc32c.value(out) != row.crc32c:
                    return False
    except CorruptShard:
        return False
    return True


def write_commit(
    store: StoreView, unit: ShardId, entries: dict[int, PlanEntry], rows: dict[int, ShardRow]
) -> None:
    """Write the unit's commit record, which makes its shard part of the store."""
    lines = [
        {
            "row": unit.shard * store.rows_per_shard + slot,
            "key": entry["key"],
            "content_hash": rows[slot].content_hash,
            "status": "encoded" if rows[slot].crc32c is not None else "rejected",
            "reason": rows[slot].reason,
            "detail": rows[slot].detail,
            "crc32c": rows[slot].crc32c,
        }
        for slot, entry in sorted(entries.items())
    ]
    manifest = store.manifest
    write_parquet(manifest.commit(unit), pa.Table.from_pylist(lines, COMMIT), manifest.staging)
