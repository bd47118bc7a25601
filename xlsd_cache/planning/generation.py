"""Writes the next generation of a store: its arrays grown to hold the new rows, then its log."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.store.commit import planning, tidy
from xlsd_cache.store.identity import attributes_of, is_store
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_files import grow_array, write_group


@contextmanager
def plan_lock(manifest: Manifest) -> Iterator[None]:
    """Create the store's folders and hold its plan lock, with leftovers of killed builds removed.

    Raises UserError where one of the folders is a link.
    """
    manifest.make_folders()
    with planning(manifest):
        tidy(manifest)
        manifest.fold()
        yield


def create_group(store: StoreView, origin: str = "") -> None:
    """Write the zarr group of a new store; does nothing where it exists.

    `origin` is appended to the attribute that describes the latents.
    """
    if not is_store(store.manifest.root):
        attributes = attributes_of(store.identity, store.rows_per_shard)
        attributes["latents"] += origin
        write_group(store.manifest, attributes)


def write_generation(
    store: StoreView,
    entries: pa.Table,
    removed: list[str],
    captions: pa.Table,
    damaged: pa.Table | None = None,
) -> int:
    """Log the next generation and return its number; the caller holds the plan lock.

    `entries` (PLAN), `removed`, `captions` and `damaged` as of Manifest.write_plan. Each bucket's
    array is grown first, to the entries' last row.
    """
    placed = entries.filter(pc.greater_equal(entries["row"], 0))
    last = placed.group_by("bucket").aggregate([("row", "max")])
    for bucket, row in zip(last["bucket"].to_pylist(), last["row_max"].to_pylist(), strict=True):
        grow_array(store, bucket, row + 1)
    generation = max(store.manifest.generations(), default=-1) + 1
    store.manifest.write_plan(generation, entries, removed, captions, damaged)
    return generation
