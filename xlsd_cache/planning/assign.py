"""Bucket, crop and row of images: by their size in pixels, and behind what the log gave out."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.images.buckets import Buckets, Placement
from xlsd_cache.images.decode import too_large
from xlsd_cache.outcomes import Rejected
from xlsd_cache.planning.log_state import Known
from xlsd_cache.runtime.arrow import lookup
from xlsd_cache.schema import PLAN

Mask = NDArray[np.bool_]


def place(images: pa.Table, facts: pa.Table, buckets: Buckets, max_pixels: int) -> pa.Table:
    """PLAN of the images by their size in pixels alone, rows not given yet."""
    width, height = (facts[name].to_numpy().astype(np.int64) for name in ("width", "height"))
    sizes, which = np.unique((width << 32) + height, return_inverse=True)
    placed: list[tuple[str, str, str, tuple[float, ...]]] = []
    for size in sizes.tolist():
        given = _of_size(size >> 32, size & 0xFFFFFFFF, buckets, max_pixels) if size > 0 else None
        if isinstance(given, Placement):
            placed.append((given.bucket.name, "", "", given.crop))
        else:
            why = (given.reason, given.detail) if given else ("", "")
            placed.append(("", *why, (0.0, 0.0, 0.0, 0.0)))
    bucket, reason, detail = (
        pa.array([row[i] for row in placed], pa.string()).take(pa.array(which)) for i in range(3)
    )
    unread = pc.not_equal(facts["reason"].combine_chunks(), "")
    n = images.num_rows
    crops = np.array([row[3] for row in placed], np.float64).reshape(-1, 4)[which]
    return pa.table(
        [
            *(images[name] for name in ("key", "source", "size", "mtime_ns")),
            facts["width"],
            facts["height"],
            _crops(crops),
            bucket,
            pa.array(np.full(n, -1)),
            pa.array([""] * n, pa.string()),
            pc.if_else(unread, facts["reason"].combine_chunks(), reason),
            pc.if_else(unread, facts["detail"].combine_chunks(), detail),
            images["inode"],
            images["ctime_ns"],
        ],
        schema=PLAN,
    )


def _of_size(width: int, height: int, buckets: Buckets, max_pixels: int) -> Placement | Rejected:
    return too_large(width, height, max_pixels) or buckets.place(width, height)


def give_rows(entries: pa.Table, hashes: pa.Array, known: Known) -> tuple[pa.Table, Mask]:
    """Known contents keep their latent; the rest get rows, and are marked in the mask.

    Rows are in an order that looks random and depends on the keys alone, so that a contiguous
    block of a bucket is a random sample of it, and planning is repeatable.
    """
    placed = pc.equal(entries["reason"], "").to_numpy()
    have = lookup(pc.if_else(pc.equal(hashes, ""), None, hashes), known.content["content_hash"])
    reused = placed & (have >= 0)
    fresh = placed & ~reused
    latent = known.content.take(pa.array(have, mask=~reused))
    bucket = pc.coalesce(latent["bucket"], entries["bucket"])
    row = pc.fill_null(latent["row"], -1).to_numpy().copy()
    crop = np.where(reused[:, None], crop_matrix(latent["crop"]), crop_matrix(entries["crop"]))
    at = np.flatnonzero(fresh)
    keys = entries["key"].take(pa.array(at)).to_pylist()
    digests = (hashlib.blake2b(key.encode()).digest()[:8] for key in keys)
    random = np.frombuffer(b"".join(digests), ">u8")
    codes = bucket.combine_chunks().take(pa.array(at)).dictionary_encode()
    ordered = np.lexsort([random, codes.indices.to_numpy()])
    code = codes.indices.to_numpy()[ordered]
    starts = np.searchsorted(code, np.arange(len(codes.dictionary)))
    base = np.array([known.next_rows.get(name, 0) for name in codes.dictionary.to_pylist()], int)
    row[at[ordered]] = np.arange(len(at)) - starts[code] + base[code]
    for name, column in (("bucket", bucket), ("row", pa.array(row)), ("crop", _crops(crop))):
        entries = entries.set_column(PLAN.get_field_index(name), PLAN.field(name), column)
    return entries, fresh


def _crops(matrix: NDArray[np.float64]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), 4)


def crop_matrix(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """float64 [n, 4]; a null's values are whatever they are."""
    crops = column.combine_chunks()
    start = 4 * crops.offset
    values: NDArray[np.float64] = crops.values.to_numpy(zero_copy_only=False)
    return values[start : start + 4 * len(crops)].reshape(-1, 4)
