"""Reads one shard back whole and compares it with its commit record."""

from dataclasses import dataclass
from typing import Any, Literal

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xlsd_cache.schema import COMMIT
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.shard import CRC_NBYTES, MISSING, CorruptShard, Fault, ShardReader
from xlsd_cache.store.view import StoreView

_FAULTS: dict[Fault, str] = {
    "missing": "are not in the shard",
    "truncated": "are cut short",
    "checksum": "have a wrong crc32c",
}
LISTED = 20  # images that a problem lists; the rest are counted
ProblemKind = Literal[
    "plan",  # the log itself: cannot be repaired
    "captions",
    "commit",
    "shard",  # the file as a whole
    "latents",
    "array",
    "index",
    "live",  # masks for plain zarr readers
    "stray",
    "pending",  # unfinished, not broken
    "image",  # an image file that changed since it was encoded: the store is right
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the images that it concerns."""

    kind: ProblemKind
    where: str  # the file, relative to the store
    what: str
    images: tuple[str, ...] = ()  # keys
    unit: ShardId | None = None
    rows: tuple[int, ...] = ()  # in the unit's bucket, whose latents must not be used

    def __str__(self) -> str:
        listed = ", ".join(self.images[:LISTED])
        more = f" and {len(self.images) - LISTED} more" if len(self.images) > LISTED else ""
        return f"{self.where} {self.what}" + (f": {listed}{more}" if listed else "")


def planned_rows(store: StoreView) -> dict[str, NDArray[np.int64]]:
    """Bucket -> every row ever planned in it, sorted."""
    root, files = store.manifest.root, store.manifest.files(store.generation)
    plans = [root / name for name in files if name.startswith("manifest/plan/")]
    columns = ["bucket", "row"]  # the other columns are large
    planned = pa.concat_tables([pq.read_table(path, columns=columns) for path in plans])
    planned = planned.filter(pc.greater_equal(planned["row"], 0))
    names = planned["bucket"].combine_chunks().dictionary_encode()
    rows, codes = planned["row"].to_numpy(), names.indices.to_numpy()
    return {
        str(bucket): np.sort(rows[codes == code])
        for code, bucket in enumerate(names.dictionary.to_pylist())
    }


def verify_shard(store: StoreView, unit: ShardId, damaged: set[int]) -> list[Problem]:
    """Check every committed row of one shard, also of images that left training.

    `damaged` are rows that a repair gave up, which are not checked.
    """
    commit = pq.read_table(store.manifest.commit(unit), schema=COMMIT)
    rows = [
        row
        for row in commit.filter(pc.equal(commit["status"], "encoded")).to_pylist()
        if row["row"] not in damaged
    ]
    path = store.manifest.shard(unit)
    where = store.relative(path)
    latent = np.empty(store.identity.shape(unit.bucket), store.identity.dtype)
    try:
        reader = store.open_shard(unit)
    except (CorruptShard, OSError) as error:
        gone = isinstance(error, FileNotFoundError)
        why = error.message if isinstance(error, CorruptShard) else error
        what = "is missing" if gone else f"is damaged ({why})"
        lost = tuple(row["key"] for row in rows), unit, tuple(row["row"] for row in rows)
        what = f"{what}; {len(rows)} latents are lost"
        return [Problem("shard", where, what, *lost)] if rows else []
    try:
        faults: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            fault = _latent_fault(reader, row["row"] % store.rows_per_shard, row["crc32c"], latent)
            if fault:
                faults.setdefault(fault, []).append(row)
        problems = [
            Problem(
                "latents",
                where,
                f"holds {len(bad)} latents (of {len(rows)}) that {fault}",
                tuple(row["key"] for row in bad),
                unit,
                tuple(row["row"] for row in bad),
            )
            for fault, bad in faults.items()
        ]
        return problems + _shard_fault(store, reader, unit, commit, latent.nbytes)
    finally:
        reader.close()


def _latent_fault(reader: ShardReader, slot: int, crc32c: int, latent: NDArray[Any]) -> str:
    """Read one row into `latent`; what is wrong with it, or empty."""
    flat = latent.reshape(-1).view(np.uint8)
    try:
        reader.read_into(slot, flat)
    except CorruptShard as error:
        return _FAULTS[error.fault]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if google_crc32c.value(flat) != crc32c:
        return "are not what was committed"
    # by the exponent's bits: takes a quarter of isfinite's time for float16
    exponent = {2: 0x7C00, 4: 0x7F80_0000}[latent.itemsize]
    finite = (latent.view(f"u{latent.itemsize}") & exponent).max() < exponent
    return "" if finite else "hold NaN or infinity"


def _shard_fault(
    store: StoreView, reader: ShardReader, unit: ShardId, commit: pa.Table, nbytes: int
) -> list[Problem]:
    """Bytes or rows of a shard that are not in its commit record."""
    encoded = commit.filter(pc.equal(commit["status"], "encoded"))["row"].to_numpy()
    held = np.flatnonzero(np.asarray(reader.offsets) != MISSING)
    extra = np.setdiff1d(held, encoded % store.rows_per_shard)
    length = len(held) * (nbytes + CRC_NBYTES) + 16 * store.rows_per_shard + CRC_NBYTES
    size = reader.path.stat().st_size
    faults = []
    if len(extra):
        faults.append(f"holds {len(extra)} rows that its commit record does not name")
    if size != length:
        faults.append(f"has {size} bytes, where its records and index take {length}")
    where = store.relative(reader.path)
    return [Problem("shard", where, what, unit=unit) for what in faults]
