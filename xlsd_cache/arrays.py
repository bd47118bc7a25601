"""The zarr metadata, made by zarr-python and put in place by us: zarr itself never syncs a file."""

import asyncio
import json
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from xlsd_cache.durable import fsync_folder, write_bytes
from xlsd_cache.manifest import Manifest


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
    rows = -(-rows // shard) * shard
    path = manifest.array(bucket) / "zarr.json"
    if path.exists() and json.loads(path.read_bytes())["shape"][0] >= rows:
        return
    memory = MemoryStore()
    group = zarr.create_group(memory)
    group.create_array(
        bucket,
        shape=(rows, *shape),
        chunks=(1, *shape),
        shards=(shard, *shape),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("sample", "channel", "y", "x"),
    )
    path.parent.mkdir(exist_ok=True)
    fsync_folder(path.parent.parent)
    _put(memory, f"{bucket}/zarr.json", path, manifest.staging)


def _put(memory: MemoryStore, key: str, path: Path, staging: Path) -> None:
    data = asyncio.run(memory.get(key, default_buffer_prototype()))
    assert data is not None  # zarr-python has just written it
    write_bytes(path, data.to_bytes(), staging)
