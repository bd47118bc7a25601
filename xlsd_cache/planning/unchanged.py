"""Classifies scanned images against the log: by size and times, where those differ by content."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.images.header import MAX_PIXELS, max_bytes
from xlsd_cache.outcomes import FAILURES, RETRIED
from xlsd_cache.planning.probe import read_hashes

Mask = NDArray[np.bool_]
SCANNED = -1  # width and height in the log of an image that the scan rejected


@dataclass(frozen=True)
class Classified:
    """Masks over the scanned images. Those neither unchanged nor a copy are new or changed."""

    refused: Mask  # rejected by the scan itself, whatever the log says
    unchanged: Mask  # as the log has it; the log's line stays
    copies: Mask  # as the log has it, a duplicate, whose original may be gone
    new_times: Mask  # unchanged, proved by its content; inode or ctime are to be logged again
    hashes: pa.Array  # sha256 of what was read to find out, else empty


def classify(
    images: pa.Table,
    logged: pa.Table,
    max_pixels: int,
    rehash: bool,
    journal: Path | None,
    workers: int,
) -> Classified:
    """Compare IMAGES with their lines in the log (PLAN), aligned; null where there is none.

    Where size and mtime are the log's but inode or ctime differ, another file may have taken the
    name, so its content is read and compared. An older log has neither: it is trusted. With
    `rehash` every content is read.
    """
    refused = np.asarray(pc.not_equal(images["reason"], ""))
    by_scan = np.asarray(pc.fill_null(pc.less(logged["width"], 0), False))
    same = equal(logged, images, "size") & equal(logged, images, "mtime_ns") & (refused == by_scan)
    same &= ~(refused & ~(equal(logged, images, "reason") & equal(logged, images, "detail")))
    same &= refused | ~_is_retried(logged, max_pixels, rehash)
    doubtful = same & ~refused
    if not rehash:
        doubtful &= _differ(logged, images, "inode") | _differ(logged, images, "ctime_ns")
    to_read = doubtful & np.asarray(pc.fill_null(pc.not_equal(logged["content_hash"], ""), False))
    title = "hashing every image" if rehash else "new inode or ctime: comparing content"
    read = read_hashes(images.filter(pa.array(to_read)), journal, workers, title)
    hashes = pc.replace_with_mask(pa.repeat("", images.num_rows), pa.array(to_read), read)
    proved = to_read & np.asarray(pc.fill_null(pc.equal(logged["content_hash"], hashes), False))
    same &= ~doubtful | proved
    copies = same & ~refused & among(logged["reason"], {"duplicate"})
    old_times = ~(equal(logged, images, "inode") & equal(logged, images, "ctime_ns"))
    unchanged = same & ~copies
    return Classified(refused, unchanged, copies, unchanged & proved & old_times, hashes)


def _is_retried(logged: pa.Table, max_pixels: int, rehash: bool) -> Mask:
    """Whether the log's rejection may no longer hold: a passing fault, or a limit since changed.

    Older logs lack the size of an image over the limit, which was MAX_PIXELS then.
    """
    again: Mask = among(logged["reason"], RETRIED | FAILURES if rehash else RETRIED)
    large = among(logged["reason"], {"too_many_pixels"})
    if large.any():
        sides = (pc.cast(logged[name], pa.int64()) for name in ("width", "height"))
        pixels = np.asarray(pc.fill_null(pc.multiply(*sides), 0))
        again |= large & np.where(pixels > 0, pixels <= max_pixels, max_pixels > MAX_PIXELS)
    fits = np.asarray(pc.fill_null(pc.less_equal(logged["size"], max_bytes(max_pixels)), False))
    again |= among(logged["reason"], {"too_many_bytes"}) & fits
    return again


def equal(a: pa.Table, b: pa.Table, column: str) -> Mask:
    """Whether a column is equal, row by row; false where either is null."""
    return np.asarray(pc.fill_null(pc.equal(a[column], b[column]), False))


def _differ(a: pa.Table, b: pa.Table, column: str) -> Mask:
    """Whether a column differs, row by row; false where either is null."""
    return np.asarray(pc.fill_null(pc.not_equal(a[column], b[column]), False))


def among(column: pa.ChunkedArray, values: Set[str]) -> Mask:
    """Whether each value is one of `values`."""
    return np.asarray(pc.is_in(column, value_set=pa.array(sorted(values))))
