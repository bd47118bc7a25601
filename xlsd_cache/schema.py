"""The store's tables, column by column: the log (parquet) and what is derived from it (Arrow).

manifest/plan/NNNNNN.parquet       PLAN, one file a generation
manifest/removed/NNNNNN.parquet    REMOVED
manifest/damaged/NNNNNN.parquet    DAMAGED
manifest/commit/BUCKET.N.parquet   COMMIT, one file a shard
captions/base.parquet, delta-*     CAPTIONS, one file a generation
manifest/folded/KIND.parquet       the small files of PLAN, COMMIT or CAPTIONS as one; derived
index.arrow                        SAMPLES and a column for each kind of caption
tags.COLUMN.arrow                  TAGS
"""

from typing import NotRequired, TypedDict

import pyarrow as pa

# What a scan finds; in memory only.
IMAGES = pa.schema(
    [
        ("key", pa.string()),  # SOURCE/PATH within it, unique
        ("source", pa.string()),  # where the bytes are read from; see files.uri
        ("size", pa.int64()),  # bytes
        ("mtime_ns", pa.int64()),
        ("inode", pa.int64()),
        ("ctime_ns", pa.int64()),
        ("url", pa.string()),  # as img2dataset notes it next to the image; null where unknown
        ("reason", pa.string()),  # an outcomes.Reason where the scan rejects it, else empty
        ("detail", pa.string()),
    ]
)
# Every change to a caption; an empty text takes the caption back.
CAPTIONS = pa.schema([("key", pa.string()), ("column", pa.string()), ("text", pa.string())])
# New and changed images of a generation, and where each goes.
PLAN = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("size", pa.int64()),  # bytes; with mtime_ns it says whether a file changed
        ("mtime_ns", pa.int64()),
        ("width", pa.int32()),  # of the upright image; 0 where its header could not be read
        ("height", pa.int32()),
        ("crop", pa.list_(pa.float64(), 4)),  # left, top, right, bottom in upright pixels
        ("bucket", pa.string()),  # WIDTHxHEIGHT; empty where the image has no row
        ("row", pa.int64()),  # in the bucket's array; -1 where the image has none
        ("content_hash", pa.string()),  # sha256 of the file; empty where planning did not need it
        ("reason", pa.string()),  # an outcomes.Reason where the image has no row, else empty
        ("detail", pa.string()),
        ("inode", pa.int64()),  # with ctime_ns it says whether another file took its name; null
        ("ctime_ns", pa.int64()),  # where imported, and in logs of the first version
    ]
)
PLACE = ["bucket", "row"]  # the columns that say where a latent is


class PlanEntry(TypedDict):
    """One row of PLAN, as `to_pylist` gives it."""

    key: str
    source: str
    size: int
    mtime_ns: int
    width: int
    height: int
    crop: list[float]
    bucket: str
    row: int
    content_hash: str
    reason: str
    detail: str
    inode: NotRequired[int | None]
    ctime_ns: NotRequired[int | None]
    live: NotRequired[bool]  # whether it is the last line of its key; not in PLAN, see units.py


LATER = frozenset({"inode", "ctime_ns"})  # columns that the first version's plans lack
# Keys that leave training with a generation.
REMOVED = pa.schema([("key", pa.string())])
# Rows whose latent `check --repair` found damaged; no image uses them again.
DAMAGED = pa.schema([("bucket", pa.string()), ("row", pa.int64())])
# What became of each planned row of a shard.
COMMIT = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),  # the image's name when it was encoded
        ("content_hash", pa.string()),  # sha256 of the image file; empty where it was not read
        ("status", pa.string()),  # encoded | rejected
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("crc32c", pa.uint32()),  # of the latent's bytes
    ]
)
# Live samples sorted by (bucket, row); the caption columns follow.
SAMPLES = pa.schema(
    [
        *(
            PLAN.field(name).with_nullable(False)
            for name in ("key", "source", "width", "height", "crop", "bucket", "row")
        ),
        COMMIT.field("content_hash"),
        COMMIT.field("crc32c").with_nullable(False),
    ]
)
# Inverted index of one caption column: each tag once, sorted, with its rows of SAMPLES.
TAGS = pa.schema([("tag", pa.large_string()), ("samples", pa.large_list(pa.int32()))])
MOST_ROWS = 2**31  # of a bucket's array
