"""Which images are as the log has them: by their times, and where those differ by their content."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.images.decode import MAX_PIXELS, max_bytes
from xlsd_cache.outcomes import FAILURES, RETRIED
from xlsd_cache.planning.probe import read_hashes

Mask = NDArray[np.bool_]
SCANNED = -1  # width and height in the log of an image that the scan rejected


@dataclass(frozen=True)
class Standing:
    """How each scanned image stands to the log."""

    refused: Mask  # the scan itself rejects it
    settled: Mask  # the log holds for it
    copies: Mask  # as the log has it, but a duplicate, whose original may be gone
    renewed: Mask  # settled, its content proved to be the log's, but not its times
    hashes: pa.Array  # sha256 of what was read for this, else empty


def compare(
    images: pa.Table,
    logged: pa.Table,
    max_pixels: int,
    rehash: bool,
    journal: Path | None,
    workers: int,
) -> Standing:
    """Compare sources.IMAGES with their lines in the log, aligned; nulls where there is none.

    Where size and mtime are the log's but inode or ctime are not, another file may have taken the
    name, so its content is read and compared. An older log knows neither: it is trusted. With
    `rehash` every content is.
    """
    refused = np.asarray(pc.not_equal(images["reason"], ""))
    by_scan = np.asarray(pc.fill_null(pc.less(logged["width"], 0), False))
    same = equal(logged, images, "size") & equal(logged, images, "mtime_ns") & (refused == by_scan)
    same &= ~(refused & ~(equal(logged, images, "reason") & equal(logged, images, "detail")))
    same &= refused | ~_tried_again(logged, max_pixels, rehash)
    doubted = same & ~refused
    if not rehash:
        doubted &= _differ(logged, images, "inode") | _differ(logged, images, "ctime_ns")
    to_read = doubted & np.asarray(pc.fill_null(pc.not_equal(logged["content_hash"], ""), False))
    doing = "hashing every image" if rehash else "new inode or ctime: comparing content"
    read = read_hashes(images.filter(pa.array(to_read)), journal, workers, doing)
    hashes = pc.replace_with_mask(pa.repeat("", images.num_rows), pa.array(to_read), read)
    proved = to_read & np.asarray(pc.fill_null(pc.equal(logged["content_hash"], hashes), False))
    same &= ~doubted | proved
    copies = same & ~refused & among(logged["reason"], {"duplicate"})
    old_times = ~(equal(logged, images, "inode") & equal(logged, images, "ctime_ns"))
    return Standing(refused, same & ~copies, copies, same & ~copies & proved & old_times, hashes)


def _tried_again(logged: pa.Table, max_pixels: int, rehash: bool) -> Mask:
    """What failed by the moment's fault, or by a limit that is another now.

    Older logs lack the sides of an image that was over the limit, which then was MAX_PIXELS.
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
    """Whether the column is the same, row by row; false where either is null."""
    return np.asarray(pc.fill_null(pc.equal(a[column], b[column]), False))


def _differ(a: pa.Table, b: pa.Table, column: str) -> Mask:
    """Whether the column is another, row by row; false where either is null."""
    return np.asarray(pc.fill_null(pc.not_equal(a[column], b[column]), False))


def among(column: pa.ChunkedArray, values: Set[str]) -> Mask:
    """Whether each is one of these."""
    return np.asarray(pc.is_in(column, value_set=pa.array(sorted(values))))
