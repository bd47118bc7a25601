"""Sums the outcome of every image: scanned = encoded + reused + duplicate + rejected + pending."""

from collections.abc import Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xlsd_cache.planning.log_state import shard_names
from xlsd_cache.runtime.arrow import counts, lookup_rows, take_or_null
from xlsd_cache.runtime.atomic import write_json
from xlsd_cache.runtime.bounded_files import read_json, require_regular
from xlsd_cache.schema import PLACE, PLAN
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.view import StoreView


@dataclass(frozen=True)
class Accounting:
    """Number of images of each outcome, of one scan."""

    scanned: int
    encoded: int  # live, committed since the build started
    reused: int  # live, committed before
    duplicate: int
    rejected: dict[str, int]  # reason -> images
    pending: int  # planned and not encoded yet; 0 after a complete build
    buckets: dict[str, int]  # bucket -> live images

    @property
    def live(self) -> int:
        """Images with a latent."""
        return self.encoded + self.reused

    @property
    def is_sound(self) -> bool:
        """Whether types and sums are right; those of a file may not be."""
        numbers = [self.scanned, self.encoded, self.reused, self.duplicate, self.pending]
        numbers += [*self.rejected.values(), *self.buckets.values()]
        if not all(type(number) is int and number >= 0 for number in numbers):
            return False
        left_out = self.duplicate + sum(self.rejected.values()) + self.pending
        return self.live + left_out == self.scanned

    def __str__(self) -> str:
        total = self.live + self.duplicate + sum(self.rejected.values()) + self.pending
        assert total == self.scanned, f"the sums are wrong: {self}"  # a bug, not a user's mistake
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.rejected.items())
        rejected = f"{sum(self.rejected.values())} rejected" + (f" ({reasons})" if reasons else "")
        parts = [f"{self.encoded} encoded", f"{self.reused} reused"]
        parts += [f"{self.duplicate} duplicate", rejected]
        parts += [f"{self.pending} pending"] if self.pending else []
        return f"{self.scanned} scanned = " + " + ".join(parts)


def account(store: StoreView, before: Set[ShardId] = frozenset()) -> tuple[Accounting, pa.Table]:
    """Count a generation's images; `before` are the shards committed before the build.

    Also returns the rejected images and the duplicates, as a table (key, reason, detail).
    """
    manifest = store.manifest
    live = manifest.live(store.generation)
    units = shard_names(live, store.rows_per_shard)
    wanted = set(pc.unique(units).to_pylist())
    committed = manifest.commits({unit for unit in manifest.committed() if unit.name in wanted})
    at = lookup_rows(live, committed, PLACE)
    has = pa.array(at >= 0)
    rows = take_or_null(committed, at)
    reason, detail = (pc.if_else(has, rows[n], live[n]) for n in ("reason", "detail"))
    out = pc.not_equal(reason, "")
    done = np.asarray(pc.and_(has, pc.invert(out)))
    was = pc.is_in(units, value_set=pa.array([unit.name for unit in before], pa.string()))
    was = np.asarray(was)
    counted = _counts(reason.filter(out))
    counts = Accounting(
        live.num_rows,
        int((done & ~was).sum()),
        int((done & was).sum()),
        counted.pop("duplicate", 0),
        counted,
        int(pc.sum(pc.invert(pc.or_(has, out))).as_py() or 0),
        _counts(live["bucket"].filter(pa.array(done))),
    )
    columns = [column.filter(out) for column in (reason, detail, live["key"])]
    left_out = pa.table(columns, names=["reason", "detail", "key"])
    return counts, left_out.select(["key", "reason", "detail"])


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Value -> number of occurrences, sorted by value."""
    return dict(sorted(counts(column).items()))


def save_accounting(manifest: Manifest, generation: int, counts: Accounting) -> None:
    """Save the sums that a build printed, for `info`."""
    value = {"generation": generation, **asdict(counts)}
    write_json(_path(manifest.root), value, manifest.staging)


def saved_accounting(root: Path, generation: int) -> Accounting | None:
    """The sums of the last build, if it completed and no generation was added since."""
    try:
        value: dict[str, Any] = read_json(_path(root))
        saved = Accounting(**value) if value.pop("generation") == generation else None
        if saved is None or not saved.is_sound:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or damaged
        return None
    return saved


def saved_outcomes(store: StoreView) -> tuple[Accounting, pa.Table] | None:
    """What `account` gave the last build, if it completed and no generation was added since."""
    root = store.manifest.root
    saved = saved_accounting(root, store.generation)
    if saved is None:
        return None
    path = root / "rejected.parquet"
    try:
        require_regular(path)
        left_out = pq.read_table(path, columns=["key", "reason", "detail"])
        left_out = left_out.cast(pa.schema([PLAN.field(name) for name in left_out.column_names]))
    except (OSError, pa.ArrowException):
        return None
    complete = left_out.num_rows == saved.duplicate + sum(saved.rejected.values())
    return (saved, left_out) if complete else None


def _path(root: Path) -> Path:
    return root / "manifest" / "accounting.json"
