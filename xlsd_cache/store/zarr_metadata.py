"""Writes zarr metadata: zarr-python makes it, and we sync it to the disk, which zarr never does."""

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
from xlsd_cache.store.view import StoreView


def write_group(manifest: Manifest, attributes: dict[str, Any]) -> None:
    """Write the group's zarr.json: from then on the folder is a store."""
    memory = MemoryStore()
    zarr.create_group(memory, attributes=attributes)
    _put(memory, "zarr.json", manifest.root / "latents.zarr" / "zarr.json", manifest.staging)


def grow_array(store: StoreView, bucket: str, rows: int) -> None:
    """Make the bucket's array hold `rows` rows, rounded up to whole shards, if it is shorter.

    A sample is one inner chunk, uncompressed and with a crc32c; missing ones take no space.
    """
    existing = array_rows(store.manifest.array(bucket) / "zarr.json")
    if existing is None or existing < rows:
        write_array(store, bucket, rows)


def array_rows(path: Path) -> int | None:
    """The number of rows in an array's zarr.json; None where it is missing or damaged."""
    try:
        rows: int = read_json(path)["shape"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return rows if type(rows) is int else None


def array_fault(store: StoreView, bucket: str, rows: int) -> str:
    """What is wrong with the zarr.json of a bucket with `rows` planned rows; empty if nothing."""
    try:
        existing = zarr.open_array(store.manifest.array(bucket), mode="r").metadata
    except FileNotFoundError:
        return "is missing"
    except Exception as error:  # zarr raises anything for damaged JSON
        return f"is not readable: {one_line(error)}"
    if not isinstance(existing, ArrayV3Metadata):
        return "is of another zarr format"
    ours = zarr.open_array(_in_memory(store, bucket, rows), path=bucket).metadata
    if existing.shape[1:] == ours.shape[1:] and existing.shape[0] < ours.shape[0]:
        return f"is too short: {existing.shape[0]} rows, where {ours.shape[0]} are planned"
    return "" if replace(ours, shape=existing.shape) == existing else "has another layout"


def write_array(store: StoreView, bucket: str, rows: int) -> None:
    """Write or replace the bucket's zarr.json, for other readers: ours does not need it."""
    memory, folder = _in_memory(store, bucket, rows), store.manifest.array(bucket)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)
    _put(memory, f"{bucket}/zarr.json", folder / "zarr.json", store.manifest.staging)


def _in_memory(store: StoreView, bucket: str, rows: int) -> MemoryStore:
    """A group with the bucket's array, as zarr-python creates it."""
    shape, shard = store.identity.shape(bucket), store.rows_per_shard
    memory = MemoryStore()
    zarr.create_group(memory).create_array(
        bucket,
        shape=(-(-rows // shard) * shard, *shape),
        chunks=(1, *shape),
        shards=(shard, *shape),
        dtype=store.identity.dtype,
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
