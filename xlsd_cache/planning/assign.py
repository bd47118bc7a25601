"""Assigns bucket and crop to images by their size in pixels, and rows in the buckets' arrays."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.images.buckets import Buckets
from xlsd_cache.images.header import too_large
from xlsd_cache.outcomes import Rejected
from xlsd_cache.planning.log_state import LogState, set_plan_column
from xlsd_cache.runtime.arrow import Ints, lookup, lookup_rows, take_or_null
from xlsd_cache.schema import PLAN

Mask = NDArray[np.bool_]
_SIDES = ["width", "height"]
_SLICE = 1 << 14  # sizes that are dictionaries at a time, a kilobyte each
_PLACEMENT = pa.schema([PLAN.field(name) for name in ("bucket", "crop", "reason", "detail")])


def assign_buckets(images: pa.Table, facts: pa.Table, buckets: Buckets, limit: int) -> pa.Table:
    """PLAN of `images` with bucket and crop, or with the reason why not; row is -1.

    `facts` has width, height, reason and detail of each image; `limit` is in pixels.
    """
    sizes = facts.group_by(_SIDES, use_threads=False).aggregate([])
    parts = (sizes.slice(start, _SLICE).to_pylist() for start in range(0, sizes.num_rows, _SLICE))
    placed = [
        pa.Table.from_pylist(
            [_of_size(it["width"], it["height"], buckets, limit) for it in part], _PLACEMENT
        )
        for part in parts
    ]
    which = pa.array(lookup_rows(facts, sizes, _SIDES))
    placements = pa.concat_tables([_PLACEMENT.empty_table(), *placed]).take(which)
    has_reason = pc.not_equal(facts["reason"], "")
    columns = {
        **{name: images[name] for name in ("key", "source", "size", "mtime_ns")},
        **{name: facts[name] for name in _SIDES},
        **{name: placements[name] for name in ("crop", "bucket")},
        "row": pa.array(np.full(images.num_rows, -1)),
        "content_hash": pa.repeat("", images.num_rows),
        "reason": pc.if_else(has_reason, facts["reason"], placements["reason"]),
        "detail": pc.if_else(has_reason, facts["detail"], placements["detail"]),
        **{name: images[name] for name in ("inode", "ctime_ns")},
    }
    return pa.table(columns, schema=PLAN)


def _of_size(width: int, height: int, buckets: Buckets, limit: int) -> dict[str, Any]:
    """_PLACEMENT of images of this size; an unknown size, not above 0, has none."""
    nowhere = {"bucket": "", "crop": [0.0] * 4, "reason": "", "detail": ""}
    if width <= 0:
        return nowhere
    placed = too_large(width, height, limit) or buckets.place(width, height)
    if isinstance(placed, Rejected):
        return nowhere | {"reason": placed.reason, "detail": placed.detail}
    return nowhere | {"bucket": placed.bucket.name, "crop": placed.crop}


def assign_rows(entries: pa.Table, hashes: pa.Array, state: LogState) -> tuple[pa.Table, Mask]:
    """The entries with rows, and a mask of those that get a new row and are to be encoded.

    An image whose content has a latent gets that latent's bucket, row and crop.
    """
    has_bucket = pc.equal(entries["reason"], "").to_numpy()
    at = lookup(pc.if_else(pc.equal(hashes, ""), None, hashes), state.content["content_hash"])
    is_reused = has_bucket & (at >= 0)
    is_new = has_bucket & ~is_reused
    latent = take_or_null(state.content, np.where(is_reused, at, -1))
    bucket = pc.coalesce(latent["bucket"], entries["bucket"])
    crop = pc.if_else(pa.array(is_reused), latent["crop"], entries["crop"])
    row = pc.fill_null(latent["row"], -1).to_numpy().copy()
    row[is_new] = _new_rows(
        entries["key"].filter(pa.array(is_new)), bucket.filter(pa.array(is_new)), state.next_rows
    )
    for name, column in (("bucket", bucket), ("row", pa.array(row)), ("crop", crop)):
        entries = set_plan_column(entries, name, column)
    return entries, is_new


def _new_rows(keys: pa.ChunkedArray, buckets: pa.ChunkedArray, next_rows: dict[str, int]) -> Ints:
    """Rows from each bucket's next free one on, in an order that depends on the keys alone.

    The order looks random, so that a contiguous block of a bucket is a random sample of it.
    """
    digests = (hashlib.blake2b(key.encode()).digest()[:8] for key in keys.to_pylist())
    random = np.frombuffer(b"".join(digests), ">u8")
    codes = buckets.combine_chunks().dictionary_encode()
    order = np.lexsort([random, codes.indices.to_numpy()])
    code = codes.indices.to_numpy()[order]
    starts = np.searchsorted(code, np.arange(len(codes.dictionary)))
    base = np.array([next_rows.get(name, 0) for name in codes.dictionary.to_pylist()], int)
    rows = np.empty(len(order), np.int64)
    rows[order] = np.arange(len(order)) - starts[code] + base[code]
    return rows


def crop_matrix(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """float64 [n, 4]; undefined where the column is null."""
    crops = column.combine_chunks()
    start = 4 * crops.offset
    values: NDArray[np.float64] = crops.values.to_numpy(zero_copy_only=False)
    return values[start : start + 4 * len(crops)].reshape(-1, 4)
