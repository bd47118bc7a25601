"""Finish a build or an import: sums, snapshot, table of rejected images."""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from xlsd_cache.console.progress import event, writes_events
from xlsd_cache.console.terminal import say
from xlsd_cache.errors import UserError
from xlsd_cache.integrity.accounting import Accounting, account, save_accounting
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.store.commit import tidy
from xlsd_cache.store.index import make_snapshot, save_snapshot
from xlsd_cache.store.live_rows import write_live
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.view import StoreView


def conclude(store: StoreView, before: Set[ShardId]) -> Accounting:
    """Write what is derived from the journal; `before` are the shards committed before."""
    manifest = store.manifest
    counts, left_out = account(store, before)
    snapshot = make_snapshot(store)
    write_live(store, snapshot)
    save_snapshot(manifest.root, snapshot)
    write_parquet(manifest.root / "rejected.parquet", left_out, manifest.staging)
    save_accounting(manifest, store.generation, counts)
    tidy(manifest)
    return counts


def say_sums(out: Path, counts: Accounting, done: str) -> None:
    """Print what became of every input; `done` as in "images could be encoded".

    Raises UserError for a store of which nothing is live.
    """
    if writes_events():
        event("done", store=out, **asdict(counts))
    else:
        for bucket, count in counts.buckets.items():
            say(f"  {bucket:>9} {count:>9}")
        say(counts)
        if counts.rejected or counts.duplicate:
            say(f"listed in {out / 'rejected.parquet'}")
    if not counts.live:
        raise UserError(
            f"none of the {counts.scanned} {done}; {out / 'rejected.parquet'} lists the reasons"
        )


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError from writing the store into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}. What is committed is safe. Fix that "
            f"and run the same command again."
        ) from error
