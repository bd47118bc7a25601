"""Write a store of any size with a real log and sparse shards.

The images do not exist. Captions are tags whose frequencies fall steeply. Each shard contains only
its first latent; the others are holes in a sparse file, with wrong checksums. In a `readable` store
every row of a shard points to that latent.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xlsd_cache.runtime.atomic import replacing, write_parquet
from xlsd_cache.schema import CAPTIONS, COMMIT, PLAN
from xlsd_cache.store.identity import Identity, attributes_of
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.shard import CRC_NBYTES, MISSING
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_files import grow_array, write_group

IDENTITY = Identity(
    "none", "random numbers", "none", "0", 1.0, 0.0, 4, "float16", "fp32", 1, 512, "aspect", 2.5,
    False,
)  # fmt: skip
SHARES = {  # of the images per bucket
    "320x704": 0.04, "384x640": 0.08, "448x576": 0.15, "512x512": 0.30, "576x448": 0.20,
    "640x384": 0.15, "704x320": 0.08,
}  # fmt: skip
SUBJECTS = "woman man girl boy dog cat horse car house tree river city beach sky flower".split()
QUALITIES = (
    "solo smiling sitting standing running red blue green old young small large bright dark soft "
    "wooden golden distant blurred wet sunny cloudy vintage modern quiet crowded striped plain"
).split()
TAGS = [*SUBJECTS, *QUALITIES] + [
    f"{quality} {subject} {number}"
    for number in range(25)
    for quality in QUALITIES
    for subject in SUBJECTS
]
REASONS = ("truncated", "corrupt", "not_an_image", "too_small", "too_elongated", "unsupported")
TAGS_A_CAPTION = 15  # about 200 bytes
_CHUNK = 1 << 20  # images generated at a time

Ints = NDArray[np.int64]


def make_store(
    root: Path,
    images: int,
    rows_per_shard: int,
    seed: int = 0,
    *,
    identity: Identity = IDENTITY,
    shares: Mapping[str, float] = SHARES,
    readable: bool = False,
    rejected: int = 0,
) -> None:
    """Write a complete first generation with one caption column, `txt`.

    Args:
        root: the store's folder.
        images: number of images with a latent.
        rows_per_shard: rows per shard.
        seed: of latents, captions and sizes.
        identity: what the store says its latents are.
        shares: bucket -> share of the images.
        readable: whether every row can be read.
        rejected: number of images besides, rejected for REASONS in turn.

    """
    rng = np.random.default_rng(seed)
    manifest = Manifest(root)
    manifest.make_folders()
    store = StoreView(manifest, identity, rows_per_shard)
    write_group(manifest, attributes_of(identity, rows_per_shard))
    names = list(shares)
    bucket = rng.choice(len(names), images, p=list(shares.values())).astype(np.int8)
    row = np.empty(images, np.int64)
    for code, name in enumerate(names):
        mine = np.flatnonzero(bucket == code)
        row[mine] = rng.permutation(len(mine))
        by_row = mine[np.argsort(row[mine])]
        _write_bucket(store, name, by_row, rng, readable)
    _write(manifest, root / "captions" / "base.parquet", CAPTIONS, _captions(images, rng))
    plan = itertools.chain(_plan(names, bucket, row, rng), _rejected(images, rejected))
    _write(manifest, root / "manifest" / "plan" / "000000.parquet", PLAN, plan)


def _write(manifest: Manifest, path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with (
        replacing(path, manifest.staging) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for table in tables:
            writer.write_table(table)


def _keys(images: Ints) -> pa.Array:
    """Keys as img2dataset makes them: 10,000 per folder."""
    folder = pc.utf8_lpad(pa.array(images // 10_000).cast(pa.string()), 5, "0")
    number = pc.utf8_lpad(pa.array(images).cast(pa.string()), 9, "0")
    return pc.binary_join_element_wise("cc12m/", folder, "/", number, ".jpg", "")


def _hashes(count: int, rng: np.random.Generator) -> pa.Array:
    """Random sha256 digests."""
    text = pa.py_buffer(rng.bytes(32 * count).hex().encode())
    offsets = pa.py_buffer(np.arange(0, 64 * count + 1, 64, dtype=np.int32))
    return pa.Array.from_buffers(pa.string(), count, [None, offsets, text])


def _plan(
    names: list[str], bucket: NDArray[np.int8], row: Ints, rng: np.random.Generator
) -> Iterator[pa.Table]:
    for start in range(0, len(row), _CHUNK):
        images = np.arange(start, min(start + _CHUNK, len(row)))
        keys, count = _keys(images), len(images)
        width, height = rng.integers(600, 2400, (2, count), dtype=np.int32)
        zero = np.zeros(count)
        crop = np.stack([zero, zero, width, height], 1).reshape(-1)
        nothing = pa.repeat("", count)
        columns = {
            "key": keys,
            "source": pc.binary_join_element_wise("/data/", keys, ""),
            "size": rng.integers(20_000, 900_000, count),
            "mtime_ns": rng.integers(16 * 10**17, 17 * 10**17, count),
            "width": width,
            "height": height,
            "crop": pa.FixedSizeListArray.from_arrays(crop, 4),
            "bucket": pa.array(names).take(pa.array(bucket[images])),
            "row": row[images],
            "content_hash": nothing,
            "reason": nothing,
            "detail": nothing,
            "inode": images,
            "ctime_ns": rng.integers(16 * 10**17, 17 * 10**17, count),
        }
        yield pa.table(columns).cast(PLAN)


def _rejected(first: int, count: int) -> Iterator[pa.Table]:
    """Rows of the plan for `count` images whose file does not exist."""
    if not count:
        return
    keys, zeros = _keys(np.arange(first, first + count)), np.zeros(count, np.int32)
    nothing = pa.repeat("", count)
    columns = {
        **dict.fromkeys(PLAN.names, zeros),
        **dict.fromkeys(("bucket", "content_hash"), nothing),
        "key": keys,
        "source": pc.binary_join_element_wise("/data/", keys, ""),
        "crop": pa.FixedSizeListArray.from_arrays(np.zeros(4 * count), 4),
        "row": zeros - 1,
        "reason": [REASONS[i % len(REASONS)] for i in range(count)],
        "detail": pc.binary_join_element_wise("byte 812 of ", keys, " is not a marker", ""),
    }
    yield pa.table(columns).cast(PLAN)


def _captions(images: int, rng: np.random.Generator) -> Iterator[pa.Table]:
    words = pa.array(TAGS)
    for start in range(0, images, _CHUNK):
        numbers = np.arange(start, min(start + _CHUNK, images))
        # Half of all captions have the first tag, and 1 in 80 the thousandth tag.
        chosen = (len(TAGS) * rng.random(len(numbers) * TAGS_A_CAPTION) ** 3).astype(np.int32)
        offsets = np.arange(0, len(chosen) + 1, TAGS_A_CAPTION, dtype=np.int32)
        lists = pa.ListArray.from_arrays(offsets, words.take(pa.array(chosen)))
        yield pa.table(
            {
                "key": _keys(numbers),
                "column": pa.repeat("txt", len(numbers)),
                "text": pc.binary_join(lists, ", "),
            }
        ).cast(CAPTIONS)


def _write_bucket(
    store: StoreView, name: str, images: Ints, rng: np.random.Generator, readable: bool
) -> None:
    """Write array, shards and commit records of a bucket; `images` are in the order of rows."""
    if not len(images):
        return
    manifest, rows_per_shard = store.manifest, store.rows_per_shard
    grow_array(store, name, len(images))
    latent = rng.standard_normal(store.identity.shape(name), np.float32)
    latent = latent.astype(store.identity.dtype)
    crc = google_crc32c.value(latent.tobytes())
    for number, start in enumerate(range(0, len(images), rows_per_shard)):
        part = images[start : start + rows_per_shard]
        unit, count = ShardId(name, number), len(part)
        record = latent.tobytes() + crc.to_bytes(CRC_NBYTES, "little")
        _write_shard(manifest.shard(unit), record, count, rows_per_shard, readable)
        crcs = rng.integers(0, 2**32, count, dtype=np.uint32)
        crcs[: count if readable else 1] = crc
        columns = {
            "row": np.arange(start, start + count),
            "key": _keys(part),
            "content_hash": _hashes(count, rng),
            "status": pa.repeat("encoded", count),
            "reason": pa.repeat("", count),
            "detail": pa.repeat("", count),
            "crc32c": crcs,
        }
        write_parquet(manifest.commit(unit), pa.table(columns).cast(COMMIT), manifest.staging)


def _write_shard(path: Path, first: bytes, count: int, rows_per_shard: int, readable: bool) -> None:
    """Write a shard of full size that contains only its first record and its index."""
    index = np.full((rows_per_shard, 2), MISSING, "<u8")
    index[:count, 0] = 0 if readable else np.arange(count) * len(first)
    index[:count, 1] = len(first)
    data = index.tobytes()
    with path.open("wb") as file:
        file.write(first)
        file.seek(len(first) if readable else count * len(first))
        file.write(data + google_crc32c.value(data).to_bytes(CRC_NBYTES, "little"))
