"""Copy latents from other trainers' cache files into committed shards, as a build writes them."""

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.console.progress import event, progress_bar
from xlsd_cache.interop.formats import read
from xlsd_cache.interop.items import ImportItem, content_hash
from xlsd_cache.interop.plausibility import JUDGED
from xlsd_cache.outcomes import RETRIED, Rejected
from xlsd_cache.planning.log_state import by_shard, uncommitted
from xlsd_cache.runtime.signals import STOPPING, StopSignal
from xlsd_cache.schema import PlanEntry
from xlsd_cache.store.commit import Claim, claim
from xlsd_cache.store.identity import Identity
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.shard import ShardRow
from xlsd_cache.store.view import StoreView

BATCH = 64  # latents read at once: the work that a kill loses
DIVIDED = " divided by "  # in identity.preprocessing: the cached latents were scaled


@dataclass(frozen=True)
class ImportPlan:
    """The next generation, not written yet."""

    entries: list[PlanEntry]  # new, changed, renamed or rejected; row -1 where none is assigned yet
    removed: list[str]  # keys that were renamed
    again: set[str]  # origins of latents that an earlier import compared and rejected

    @property
    def fresh(self) -> list[PlanEntry]:
        """The entries with latents to import."""
        return [entry for entry in self.entries if entry["row"] < 0 and not entry["reason"]]


def plan_imports(manifest: Manifest, items: list[ImportItem]) -> ImportPlan:
    """Compare the latents with the journal.

    A cache file with the size and mtime that the journal has is not imported again, even if its
    image was renamed or deleted.
    """
    generation = max(manifest.generations(), default=-1)
    live = {entry["key"]: entry for entry in manifest.live(generation).to_pylist()}
    origins = {e["detail"] if e["row"] >= 0 else e["key"]: e for e in live.values()}
    outcome = manifest.commits(manifest.committed())
    retried = {(r["bucket"], r["row"]) for r in outcome.to_pylist() if r["reason"] in RETRIED}
    retried |= {(r["bucket"], r["row"]) for r in manifest.damaged(generation).to_pylist()}
    entries, kept, again = [], set(), set()
    for item in items:
        entry, old = item.entry(), origins.get(item.origin)
        same = old and all(old[n] == entry[n] for n in ("size", "mtime_ns"))
        if old and same and old["reason"] in JUDGED:
            again.add(item.origin)
        if (
            old is None
            or (old["bucket"], old["row"]) in retried
            or any(old[n] != entry[n] for n in ("size", "mtime_ns", "bucket", "reason"))
        ):
            entries.append(entry)
        elif item.image is None or all(old[n] == entry[n] for n in ("key", "source", "reason")):
            entry["key"] = old["key"]
        else:  # its image appeared or moved
            entries.append({**entry, "row": old["row"]})
        kept.add(entry["key"])
    names = {item.origin for item in items}
    removed = [e["key"] for origin, e in origins.items() if origin in names]
    return ImportPlan(entries, sorted(set(removed) - kept), again)


def order(key: str) -> bytes:
    """A sort key in pseudo-random order, equal on every machine."""
    return hashlib.blake2b(key.encode()).digest()


@dataclass(frozen=True)
class Transfer:
    """Copies planned latents into shards, together with other processes."""

    store: StoreView
    workers: int

    def run(self, items: list[ImportItem]) -> bool:
        """Copy every planned row that is not committed; False after a stop."""
        live = self.store.manifest.live(self.store.generation).to_pylist()
        copy = _Copy(
            {(entry["bucket"], entry["row"]): entry for entry in live},
            {item.origin: item for item in items},
            self.store.identity,
        )
        todo = self._todo()
        with (
            StopSignal(STOPPING) as stop,
            ThreadPoolExecutor(self.workers) as pool,
            progress_bar(
                desc="importing", total=sum(map(len, todo.values())), unit="latent"
            ) as bar,
        ):
            while todo and not stop.asked:
                for unit in sorted(todo):
                    taken = claim(self.store, unit, todo.__getitem__, BATCH)
                    if taken is not None:
                        _fill(taken, copy, pool, bar, stop)
                todo = self._todo()
                if todo and not stop.asked:  # other processes hold these, and may be killed
                    time.sleep(0.2)
        return not todo

    def _todo(self) -> dict[ShardId, dict[int, PlanEntry]]:
        """The planned rows of each unit that is not committed, by slot."""
        store = self.store
        planned = store.manifest.planned(store.generation)
        planned = uncommitted(store.manifest, planned, store.rows_per_shard)
        return by_shard(planned.to_pylist(), store.rows_per_shard)


def _fill(
    taken: Claim, copy: "_Copy", pool: ThreadPoolExecutor, bar: Any, stop: StopSignal
) -> None:
    """Write the remaining batches of a claimed shard and commit it, unless stopped in between."""
    try:
        for slots in taken.writer.remaining:
            if stop.asked:
                return
            done = list(pool.map(copy.one, slots, (taken.entries[slot] for slot in slots)))
            latents = {row.slot: latent for row, latent in done if latent is not None}
            taken.writer.append([row for row, _ in done], latents)
            bar.update(len(done))
            event("progress", latents=bar.n, total=bar.total)
        taken.finish()
    finally:
        taken.release()


@dataclass(frozen=True)
class _Copy:
    """Reads planned latents from the cache files."""

    live: Mapping[tuple[str, int], PlanEntry]  # (bucket, row) -> its live entry
    by_origin: Mapping[str, ImportItem]
    identity: Identity

    def one(self, slot: int, entry: PlanEntry) -> tuple[ShardRow, NDArray[Any] | None]:
        """Read the latent of one planned row in the store's dtype, or say why there is none."""
        latent, content = self._read(entry)
        if isinstance(latent, Rejected):
            return ShardRow(slot, content, reason=latent.reason, detail=latent.detail), None
        if DIVIDED in str(self.identity.preprocessing):
            latent = latent / np.float32(self.identity.scaling_factor)
            latent += np.float32(self.identity.shift_factor)
        return ShardRow(slot, content), latent.astype(self.identity.dtype, copy=False)

    def _read(self, entry: PlanEntry) -> tuple[NDArray[Any] | Rejected, str]:
        now = self.live.get((entry["bucket"], entry["row"]))
        if now is None:
            return Rejected("removed", "removed or changed after it was planned"), ""
        item = self.by_origin.get(now["detail"])
        if item is None:
            return Rejected("vanished", f"{now['detail']} is no longer in the caches"), ""
        if (item.file.size, item.file.mtime_ns) != (now["size"], now["mtime_ns"]):
            return Rejected("changed", "the cache file changed after it was planned"), ""
        return read(item.file, item.latent), content_hash(item.image)
