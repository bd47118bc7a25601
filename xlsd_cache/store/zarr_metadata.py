"""The zarr metadata, made by zarr-python and put in place by us: zarr itself never syncs a file."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import MemoryStore

from xlsd_cache.errors import one_line
from xlsd_cache.runtime.atomic import fsync_folder, write_bytes
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_cache.store.manifest import Manifest


def write_group(manifest: Manifest, attributes: dict[str, Any]) -> None:
    """Write the group's zarr.json: from then on the folder is a store."""
    memory = MemoryStore()
    zarr.create_group(memory, attributes=attributes)
    _put(memory, "zarr.json", manifest.root / "latents.zarr" / "zarr.json", manifest.staging)


def grow_array(
    manifest: Manifest, bucket: str, rows: int, shape: tuple[int, int, int], dtype: str, shard: int
) -> None:
    """Make the bucket's array hold `rows` rows of `shape`, rounded up to whole shards.

    One sample is one inner chunk, uncompressed with a crc32c; no fill value is ever stored for a
    missing one. Does nothing where the array is that long already.
    """
    path = manifest.array(bucket) / "zarr.json"
    told = rows_told(path)
    if told is not None and told >= rows:
        return
    mend_array(manifest, bucket, rows, shape, dtype, shard)


def rows_told(path: Path) -> int | None:
    """How many rows an array's zarr.json claims; None where it is missing, or damaged."""
    try:
        rows: int = read_json(path)["shape"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return rows if type(rows) is int else None


def array_fault(
    manifest: Manifest, bucket: str, rows: int, shape: tuple[int, int, int], dtype: str, shard: int
) -> str:
    """What is wrong with the bucket's zarr.json, which is to hold `rows` rows; empty if nothing."""
    try:
        there = zarr.open_array(manifest.array(bucket), mode="r").metadata
    except FileNotFoundError:
        return "is missing"
    except Exception as error:  # zarr raises whatever damaged JSON makes it stumble over
        return f"is not readable: {one_line(error)}"
    if not isinstance(there, ArrayV3Metadata):
        return "is of another zarr format"
    ours = zarr.open_array(_in_memory(bucket, rows, shape, dtype, shard), path=bucket).metadata
    if there.shape[1:] == ours.shape[1:] and there.shape[0] < ours.shape[0]:
        return f"is too short: {there.shape[0]} rows, where {ours.shape[0]} are planned"
    return "" if replace(ours, shape=there.shape) == there else "is not one of ours"


def mend_array(
    manifest: Manifest, bucket: str, rows: int, shape: tuple[int, int, int], dtype: str, shard: int
) -> None:
    """Write the bucket's zarr.json, whatever is there: our own reader has no need of it."""
    memory = _in_memory(bucket, rows, shape, dtype, shard)
    manifest.array(bucket).mkdir(exist_ok=True)
    fsync_folder(manifest.array(bucket).parent)
    _put(memory, f"{bucket}/zarr.json", manifest.array(bucket) / "zarr.json", manifest.staging)


def _in_memory(
    bucket: str, rows: int, shape: tuple[int, int, int], dtype: str, shard: int
) -> MemoryStore:
    """A group with the bucket's array, as zarr-python itself makes it."""
    memory = MemoryStore()
    zarr.create_group(memory).create_array(
        bucket,
        shape=(-(-rows // shard) * shard, *shape),
        chunks=(1, *shape),
        shards=(shard, *shape),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("sample", "channel", "y", "x"),
    )
    return memory


def _put(memory: MemoryStore, key: str, path: Path, staging: Path) -> None:
    data = asyncio.run(memory.get(key, default_buffer_prototype()))
    assert data is not None  # zarr-python has just written it
    write_bytes(path, data.to_bytes(), staging)
