"""Finish a build or an import: sums, snapshot, table of rejected images."""

import logging
from collections.abc import Set
from contextlib import AbstractContextManager
from pathlib import Path

from xlsd_cache.errors import UserError
from xlsd_cache.integrity.accounting import Accounting, account, save_accounting
from xlsd_cache.planning.sessions import committed_before
from xlsd_cache.planning.units import pending_units
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.runtime.own_files import writing
from xlsd_cache.store.commit import tidy
from xlsd_cache.store.index import cached_snapshot, make_snapshot, save_snapshot
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_files import write_live

log = logging.getLogger("xlsd.cache.building")
_SHOWN = 3  # names in a message


def finish(store: Path | str) -> Accounting:
    """Write what is derived from the log of a store whose units are all encoded; returns the sums.

    Images of units that were committed before the plan count as reused. Finishing again changes
    nothing. Raises UserError, and writes nothing, while units are pending.
    """
    root = Path(store)
    view = StoreView.open(root)
    if pending := pending_units(view):
        names = ",".join(unit.name for unit in pending[:_SHOWN])
        more = f" and {len(pending) - _SHOWN} more" if len(pending) > _SHOWN else ""
        raise UserError(
            f"{root} is not finished: {len(pending)} units are not encoded yet ({names}{more}); "
            f"run `xlsd-cache encode {root}`, then finish again"
        )
    with writing_store(root):
        counts = conclude(view, committed_before(view.manifest))
    warn_of_vanished(counts)
    return counts


def conclude(store: StoreView, before: Set[ShardId]) -> Accounting:
    """Write what is derived from the log; `before` are the shards committed before."""
    manifest = store.manifest
    counts, left_out = account(store, before)
    snapshot = cached_snapshot(manifest.root, store.generation)  # complete, so it never changes
    if snapshot is None:
        snapshot = make_snapshot(store)
        save_snapshot(manifest.root, snapshot)
    write_live(store, snapshot)
    write_parquet(manifest.root / "rejected.parquet", left_out, manifest.staging)
    save_accounting(manifest, store.generation, counts)
    tidy(manifest)
    return counts


def warn_of_vanished(counts: Accounting) -> None:
    """Log a warning where files were deleted between plan and encoding."""
    if gone := counts.rejected.get("vanished"):
        log.warning(
            f"{gone} images were deleted before they were encoded; restore them and run the same "
            f"command again"
        )


def writing_store(out: Path) -> AbstractContextManager[None]:
    """Turn an OSError from writing the store into a UserError."""
    return writing(out, "What is committed is safe")
