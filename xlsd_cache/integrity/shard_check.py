"""One shard read back whole, and the words for what is wrong with it."""

from dataclasses import dataclass
from typing import Any, Literal

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xlsd_cache.schema import COMMIT
from xlsd_cache.store.manifest import Unit
from xlsd_cache.store.shard import CRC_NBYTES, MISSING, CorruptShard, Fault, ShardReader
from xlsd_cache.store.view import StoreView

_FAULTS: dict[Fault, str] = {
    "missing": "are not in the shard",
    "truncated": "are cut short",
    "checksum": "have a wrong crc32c",
}
NAMED = 20  # images that a problem names; the rest are counted
Kind = Literal[
    "plan",  # the log itself: cannot be mended
    "captions",
    "commit",
    "shard",  # the file as a whole
    "latents",
    "array",
    "index",
    "live",  # what plain zarr readers are told
    "stray",
    "pending",  # unfinished, not broken
    "image",  # an image file that is not what was encoded: the store itself is right
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where, and the images that it concerns."""

    kind: Kind
    where: str  # the file, relative to the store
    what: str
    images: tuple[str, ...] = ()  # keys
    unit: Unit | None = None
    rows: tuple[int, ...] = ()  # of the unit's bucket, whose latents are not to be used

    def __str__(self) -> str:
        named = ", ".join(self.images[:NAMED])
        more = f" and {len(self.images) - NAMED} more" if len(self.images) > NAMED else ""
        return f"{self.where} {self.what}" + (f": {named}{more}" if named else "")


def planned_rows(store: StoreView) -> dict[str, NDArray[np.int64]]:
    """Bucket -> the rows ever planned in it, sorted."""
    files = store.manifest.files(store.generation)
    plans = [path for path in files if path.parent.name == "plan"]
    columns = ["bucket", "row"]  # the others are large
    planned = pa.concat_tables([pq.read_table(path, columns=columns) for path in plans])
    planned = planned.filter(pc.greater_equal(planned["row"], 0))
    names = planned["bucket"].combine_chunks().dictionary_encode()
    rows, codes = planned["row"].to_numpy(), names.indices.to_numpy()
    return {
        str(bucket): np.sort(rows[codes == code])
        for code, bucket in enumerate(names.dictionary.to_pylist())
    }


def verify_shard(store: StoreView, unit: Unit, damaged: set[int]) -> list[Problem]:
    """Read one committed shard whole. Rows of images that left training count as well.

    `damaged` are the rows that a repair has given up: nothing is promised of them any more.
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
        told = f"{what}; {len(rows)} latents are lost"
        return [Problem("shard", where, told, *lost)] if rows else []
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
    """What is wrong with one row, read into `latent`; empty if nothing."""
    flat = latent.reshape(-1).view(np.uint8)
    try:
        reader.read_into(slot, flat)
    except CorruptShard as error:
        return _FAULTS[error.fault]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if google_crc32c.value(flat) != crc32c:
        return "are not what was committed"
    # by the bits of the exponent: a quarter of isfinite's time for float16
    exponent = {2: 0x7C00, 4: 0x7F80_0000}[latent.itemsize]
    finite = (latent.view(f"u{latent.itemsize}") & exponent).max() < exponent
    return "" if finite else "hold NaN or infinity"


def _shard_fault(
    store: StoreView, reader: ShardReader, unit: Unit, commit: pa.Table, nbytes: int
) -> list[Problem]:
    """Bytes or rows of a shard that nobody committed."""
    encoded = commit.filter(pc.equal(commit["status"], "encoded"))["row"].to_numpy()
    held = np.flatnonzero(np.asarray(reader.offsets) != MISSING)
    extra = np.setdiff1d(held, encoded % store.rows_per_shard)
    length = len(held) * (nbytes + CRC_NBYTES) + 16 * store.rows_per_shard + CRC_NBYTES
    size = reader.path.stat().st_size
    told = []
    if len(extra):
        told.append(f"holds {len(extra)} rows that its commit record does not name")
    if size != length:
        told.append(f"has {size} bytes, where its records and index take {length}")
    where = store.relative(reader.path)
    return [Problem("shard", where, what, unit=unit) for what in told]
