"""Masks of live rows for plain zarr readers, in `latents.zarr/live/BUCKET`.

    group = zarr.open_group("latents/latents.zarr", mode="r")
    rows = np.flatnonzero(group["live/512x512"][:])

One bool per row of the bucket's array. Derived from the log at the end of each build, import and
repair, under the plan lock, and replaced by one rename per bucket, so that no row is marked live
before it is committed.
"""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from xlsd_cache.runtime.atomic import fsync_folder, write_bytes
from xlsd_cache.schema import MOST_ROWS
from xlsd_cache.store.commit import planning
from xlsd_cache.store.index import Snapshot, make_snapshot
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_metadata import array_rows

FOLDER = "live"  # a group of its own: the arrays of the group above are the buckets only
CHUNK = 1 << 20  # rows: up to a million images, a bucket is one file
ABOUT = "true where the array of that name holds a live latent; ignore all its other rows"

Mask = NDArray[np.bool_]


def write_live(store: StoreView, snapshot: Snapshot | None = None) -> None:
    """Write the masks of the newest generation; `snapshot` is used if it is of that one."""
    manifest = store.manifest
    with planning(manifest):
        newest = manifest.generations()[-1]
        if snapshot is None or snapshot.generation != newest:
            snapshot = make_snapshot(replace(store, generation=newest))
        _put(manifest, "", _files(None))
        for bucket, mask in live_masks(manifest, snapshot).items():
            _put(manifest, bucket, _files(mask))


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
    if (
        snapshot.pending or not manifest.array(FOLDER).exists()
    ):  # which earlier versions did not write
        return {}
    faults = {}
    for bucket, mask in live_masks(manifest, snapshot).items():
        try:
            stored = zarr.open_array(manifest.array(FOLDER) / bucket, mode="r")[:]
        except Exception:  # zarr raises anything for damaged files
            stored = None
        if stored is None or not np.array_equal(np.flatnonzero(stored), np.flatnonzero(mask)):
            what = "is missing or not readable" if stored is None else "is not what the log says"
            faults[f"latents.zarr/{FOLDER}/{bucket}"] = what
    return faults


def live_files(manifest: Manifest) -> set[Path]:
    """All existing files of these arrays."""
    folder = manifest.array(FOLDER)
    inside = [path for pattern in ("zarr.json", "c.*") for path in folder.glob(f"*x*/{pattern}")]
    return {folder / "zarr.json", *inside}


def _files(mask: Mask | None) -> dict[str, bytes]:
    """The files of an array, or of the group, as zarr-python writes them; the metadata first."""
    memory = MemoryStore()
    if mask is None:
        zarr.create_group(memory, attributes={"about": ABOUT})
    else:
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
    return asyncio.run(_read(memory))


async def _read(memory: MemoryStore) -> dict[str, bytes]:
    names = sorted([name async for name in memory.list()], reverse=True)  # zarr.json, c.*
    data = {name: await memory.get(name, default_buffer_prototype()) for name in names}
    return {name: file.to_bytes() for name, file in data.items() if file is not None}


def _put(manifest: Manifest, bucket: str, files: dict[str, bytes]) -> None:
    """Write the files that differ. Longer metadata with old chunks marks no new row live."""
    folder = manifest.array(FOLDER) / bucket
    if not folder.exists():
        folder.mkdir()
        fsync_folder(folder.parent)
    for name, data in files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            write_bytes(path, data, manifest.staging)
