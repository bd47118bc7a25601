"""One shard as a unit of work: claimed by a lock, written or adopted, committed by its record."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
from filelock import BaseFileLock, FileLock, Timeout

from xlsd_cache.runtime.atomic import sweep, write_parquet
from xlsd_cache.schema import COMMIT, PlanEntry
from xlsd_cache.store.manifest import Manifest, Unit
from xlsd_cache.store.shard import CorruptShard, Row, ShardWriter, read_journal
from xlsd_cache.store.view import StoreView

log = logging.getLogger("xlsd.cache.store")


@dataclass
class Claim:
    """A unit that this process alone works on, until `finish` or `release`.

    The lock is the kernel's: a killed process drops it, and the next to come goes on from what
    its journal vouches for.
    """

    unit: Unit
    entries: dict[int, PlanEntry]  # slot -> plan entry
    store: StoreView
    lock: BaseFileLock
    writer: ShardWriter

    def finish(self) -> None:
        """Put the shard in place, then its commit record; either both are seen or the second not.

        A reader looks at a shard only after its record exists.
        """
        manifest = self.store.manifest
        self.writer.finish(manifest.shard(self.unit), self.store.rows_per_shard)
        write_commit(self.store, self.unit, self.entries, self.writer.rows)
        self.writer.discard()
        _drop(manifest, self.unit, self.lock)

    def release(self) -> None:
        """Leave the unit as it is, for this or another process to go on with."""
        self.lock.release()


def claim(store: StoreView, unit: Unit, entries: dict[int, PlanEntry], batch: int) -> Claim | None:
    """Take `unit` for this process; None when another holds it or it is committed by now.

    `entries` are the planned rows by slot. A shard that was put in place by a process killed
    before its commit is adopted if every checksum holds, and made anew otherwise.
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
        final = manifest.shard(unit)
        journal = manifest.staging / f"{unit.name}.jnl"
        if final.exists():
            rows = read_journal(journal)
            if rows.keys() >= entries.keys() and _holds(store, unit, rows):
                write_commit(store, unit, entries, rows)
                journal.unlink()
                _drop(manifest, unit, lock)
                return None
            final.unlink()  # no reader has ever seen it
        batches, nbytes = _batches(sorted(entries), batch), store.identity.nbytes(unit.bucket)
        writer = ShardWriter(manifest.staging, unit.name, batches, nbytes)
        return Claim(unit, entries, store, lock, writer)
    except BaseException:
        lock.release()
        raise


@contextmanager
def planning(manifest: Manifest) -> Iterator[None]:
    """Within the block no other process adds a generation; says so where it has to wait."""
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
    """Remove what processes that were killed between commit and clean-up left in staging."""
    committed = {unit.name for unit in manifest.committed()}
    for path in manifest.staging.iterdir():
        if path.stem in committed and path.suffix in (".part", ".jnl", ".lock"):
            path.unlink(missing_ok=True)
    sweep(manifest.staging)


def lock_path(manifest: Manifest, unit: Unit) -> Path:
    """Whoever writes the unit's shard or commit record holds this lock."""
    return manifest.staging / f"{unit.name}.lock"


def _drop(manifest: Manifest, unit: Unit, lock: BaseFileLock) -> None:
    """Unlock a committed unit and remove its lock file.

    Safe only after the commit: whoever has locked the removed file then finds no work to do.
    """
    lock_path(manifest, unit).unlink(missing_ok=True)
    lock.release()


def _batches(slots: Sequence[int], batch: int) -> list[list[int]]:
    """Rows i*batch to (i+1)*batch of the shard: fixed by the plan, whatever was done before."""
    grouped: dict[int, list[int]] = {}
    for slot in slots:
        grouped.setdefault(slot // batch, []).append(slot)
    return list(grouped.values())


def _holds(store: StoreView, unit: Unit, rows: dict[int, Row]) -> bool:
    """Whether a shard holds exactly the latents that its journal names."""
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
    store: StoreView, unit: Unit, entries: dict[int, PlanEntry], rows: dict[int, Row]
) -> None:
    """Write the unit's commit record: from then on its shard counts."""
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
