"""Checks free disk space before the first batch is encoded."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.errors import UserError
from xlsd_cache.planning.log_state import LogState, uncommitted
from xlsd_cache.planning.plan import GenerationPlan
from xlsd_cache.runtime.disk import free_bytes, size
from xlsd_cache.schema import PLACE
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.shard import CRC_NBYTES
from xlsd_cache.store.view import StoreView

log = logging.getLogger("xlsd.cache.planning")

LOG_NBYTES = 512  # an image takes about so much of plan, commit record and index.arrow


def bytes_to_write(store: StoreView, places: pa.Table) -> int:
    """Bytes on the disk of the latents at `places` (bucket, row), less those written already."""
    total = 0
    placed = places.select(PLACE).group_by(PLACE).aggregate([])
    for bucket in pc.unique(placed["bucket"]).to_pylist():
        rows = placed["row"].filter(pc.equal(placed["bucket"], bucket)).to_numpy()
        latent = store.identity.nbytes(bucket) + CRC_NBYTES
        shards, counts = np.unique(rows // store.rows_per_shard, return_counts=True)
        for shard, count in zip(shards.tolist(), counts.tolist(), strict=True):
            nbytes = count * latent + 16 * store.rows_per_shard + CRC_NBYTES
            nbytes -= _staged(store.manifest, ShardId(bucket, shard))
            total += max(0, nbytes) + count * LOG_NBYTES
    return total


def check_plan_space(store: StoreView, plan: GenerationPlan, state: LogState) -> None:
    """Log what encoding the plan will write. Raises UserError if it does not fit."""
    changed = pa.concat_arrays([pa.array(plan.removed, pa.string()), *plan.entries["key"].chunks])
    live = state.live.filter(pc.invert(pc.is_in(state.live["key"], value_set=changed)))
    check_disk_space(store, pa.concat_tables([live, plan.entries]))


def check_disk_space(store: StoreView, planned: pa.Table) -> None:
    """Log what is yet to be written for these rows (PLAN). Raises UserError if it does not fit."""
    root = store.manifest.root
    places = uncommitted(store.manifest, planned, store.rows_per_shard)
    nbytes = bytes_to_write(store, places)
    if not nbytes:
        return
    free = free_bytes(root)
    if free is None:
        log.info(f"{size(nbytes)} to write")
        return
    facts = f"{size(nbytes)} to write, {size(free)} free on the disk of {root}"
    if nbytes > free:
        raise UserError(
            f"too little room: {facts}; free {size(nbytes - free)} more, give --out on a "
            f"larger disk, or build fewer images"
        )
    log.info(facts)


def _staged(manifest: Manifest, unit: ShardId) -> int:
    """Bytes of a shard that an interrupted or a running build has written."""
    for path in (manifest.staging / f"{unit.name}.part", manifest.shard(unit)):
        try:
            return path.stat().st_size
        except FileNotFoundError:
            continue
    return 0
