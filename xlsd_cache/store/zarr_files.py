"""What plain zarr readers need: metadata of the store's arrays, and masks of their live rows.

    group = zarr.open_group("latents/latents.zarr", mode="r")
    rows = np.flatnonzero(group["live/512x512"][:])

zarr-python makes the files in memory, and we sync them to the disk, which zarr never does. A mask,
`latents.zarr/live/BUCKET`, has one bool per row of the bucket's array. Masks are derived from the
log at the end of each build, import and repair, under the plan lock, and replaced by one rename per
bucket, so that no row is marked live before it is committed.
"""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import MemoryStore

from xlsd_cache.errors import one_line
from xlsd_cache.runtime.atomic import fsync_folder, write_bytes
from xlsd_cache.runtime.bounded_files import read_json, read_regular
from xlsd_cache.schema import MOST_ROWS
from xlsd_cache.store.commit import planning
from xlsd_cache.store.index import Snapshot, make_snapshot
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.view import StoreView

LIVE = "live"  # a group of its own: the arrays of the group above are the buckets only
CHUNK = 1 << 20  # rows: up to a million images, a bucket is one file
ABOUT = "true where the array of that name holds a live latent; ignore all its other rows"

Mask = NDArray[np.bool_]


def write_group(manifest: Manifest, attributes: dict[str, Any]) -> None:
    """Write the group's zarr.json: from then on the folder is a store."""
    _put(manifest, "", _group(attributes))


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
    ours = zarr.open_array(_array(store, bucket, rows)).metadata
    if existing.shape[1:] == ours.shape[1:] and existing.shape[0] < ours.shape[0]:
        return f"is too short: {existing.shape[0]} rows, where {ours.shape[0]} are planned"
    return "" if replace(ours, shape=existing.shape) == existing else "has another layout"


def write_array(store: StoreView, bucket: str, rows: int) -> None:
    """Write or replace the bucket's zarr.json, for other readers: ours does not need it."""
    _put(store.manifest, bucket, _array(store, bucket, rows))


def write_live(store: StoreView, snapshot: Snapshot | None = None) -> None:
    """Write the masks of the newest generation; `snapshot` is used if it is of that one."""
    manifest = store.manifest
    with planning(manifest):
        newest = manifest.generations()[-1]
        if snapshot is None or snapshot.generation != newest:
            snapshot = make_snapshot(replace(store, generation=newest))
        _put(manifest, LIVE, _group({"about": ABOUT}))
        for bucket, mask in live_masks(manifest, snapshot).items():
            _put(manifest, f"{LIVE}/{bucket}", _mask(mask))


def live_masks(manifest: Manifest, snapshot: Snapshot) -> dict[str, Mask]:
    """Bucket -> bool [rows of its array]."""
    masks = {}
    for path in sorted(manifest.array("").glob("*x*/zarr.json")):
        bucket = path.parent.name
        rows = array_rows(path)
        if rows is None or not 0 <= rows <= MOST_ROWS:  # which `check` reports
            continue
        start, stop = snapshot.ranges.get(bucket, (0, 0))
        live = snapshot.samples["row"].slice(start, stop - start).to_numpy()
        # Damaged metadata may give too few rows.
        masks[bucket] = np.zeros(max(rows, live.max(initial=-1) + 1), np.bool_)
        masks[bucket][live] = True
    return masks


def live_faults(manifest: Manifest, snapshot: Snapshot) -> dict[str, str]:
    """Folder within the store -> what is wrong with it; empty for stores without these arrays.

    `snapshot` is the newest generation's; nothing is checked while it is not fully encoded.
    """
    if snapshot.pending or not manifest.array(LIVE).exists():  # earlier versions wrote none
        return {}
    faults = {}
    for bucket, mask in live_masks(manifest, snapshot).items():
        try:
            stored = zarr.open_array(manifest.array(LIVE) / bucket, mode="r")[:]
        except Exception:  # zarr raises anything for damaged files
            stored = None
        if stored is None or not np.array_equal(np.flatnonzero(stored), np.flatnonzero(mask)):
            what = "is missing or not readable" if stored is None else "is not what the log says"
            faults[f"latents.zarr/{LIVE}/{bucket}"] = what
    return faults


def live_files(manifest: Manifest) -> set[Path]:
    """All existing files of the masks."""
    folder = manifest.array(LIVE)
    inside = [path for pattern in ("zarr.json", "c.*") for path in folder.glob(f"*x*/{pattern}")]
    return {folder / "zarr.json", *inside}


def _group(attributes: dict[str, Any]) -> MemoryStore:
    memory = MemoryStore()
    zarr.create_group(memory, attributes=attributes)
    return memory


def _array(store: StoreView, bucket: str, rows: int) -> MemoryStore:
    """The bucket's array without latents, as zarr-python creates it."""
    shape, shard = store.identity.shape(bucket), store.rows_per_shard
    memory = MemoryStore()
    zarr.create_array(
        memory,
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


def _mask(mask: Mask) -> MemoryStore:
    memory = MemoryStore()
    array = zarr.create_array(
        memory,
        shape=mask.shape,
        chunks=(CHUNK,),
        dtype="bool",
        compressors=[ZstdCodec(level=3)],
        fill_value=False,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("sample",),
        config={"write_empty_chunks": True},  # they replace older chunks
    )
    array[:] = mask
    return memory


def _put(manifest: Manifest, name: str, memory: MemoryStore) -> None:
    """Write the files that differ. Longer metadata with old chunks marks no new row live."""
    folder = manifest.array(name)
    for file, data in asyncio.run(_files(memory)).items():
        if not _holds(folder / file, data):
            folder.mkdir(exist_ok=True)
            fsync_folder(folder.parent)
            write_bytes(folder / file, data, manifest.staging)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return read_regular(path, len(data)) == data
    except OSError:
        return False


async def _files(memory: MemoryStore) -> dict[str, bytes]:
    """Name -> bytes of all files; the metadata first."""
    names = sorted([name async for name in memory.list()], reverse=True)  # zarr.json, c.*
    data = {name: await memory.get(name, default_buffer_prototype()) for name in names}
    return {name: file.to_bytes() for name, file in data.items() if file is not None}
