"""Nothing disappears: scanned = encoded + reused + duplicate + rejected (by reason) + pending."""

import json
from collections import Counter
from collections.abc import Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from xlsd_cache.durable import write_json
from xlsd_cache.manifest import Manifest, Unit


@dataclass(frozen=True)
class Accounting:
    """What became of every image of one scan."""

    scanned: int
    encoded: int  # live, committed since the build began
    reused: int  # live, committed before it
    duplicate: int
    rejected: dict[str, int]  # reason -> images
    pending: int  # planned and not encoded yet; 0 when a build has ended well
    buckets: dict[str, int]  # bucket -> live images

    @property
    def live(self) -> int:
        """Images that training sees."""
        return self.encoded + self.reused

    def __str__(self) -> str:
        total = self.live + self.duplicate + sum(self.rejected.values()) + self.pending
        assert total == self.scanned, f"the sums are wrong: {self}"  # our bug, never the user's
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.rejected.items())
        rejected = f"{sum(self.rejected.values())} rejected" + (f" ({reasons})" if reasons else "")
        parts = [f"{self.encoded} encoded", f"{self.reused} reused"]
        parts += [f"{self.duplicate} duplicate", rejected]
        parts += [f"{self.pending} pending"] if self.pending else []
        return f"{self.scanned} scanned = " + " + ".join(parts)


def account(
    manifest: Manifest, generation: int, rows_per_shard: int, before: Set[Unit]
) -> tuple[Accounting, pa.Table]:
    """Count a generation's images; `before` are the shards that were committed at the beginning.

    Also returns the table (key, reason, detail) of the rejected and the duplicates, for people.
    """
    live = manifest.live(generation).to_pylist()
    units = {entry["key"]: Unit(entry["bucket"], entry["row"] // rows_per_shard) for entry in live}
    committed = manifest.commits(manifest.committed() & set(units.values()))
    outcome = {(row["bucket"], row["row"]): row for row in committed.to_pylist()}
    encoded = reused = duplicate = pending = 0
    rejected: Counter[str] = Counter()
    buckets: Counter[str] = Counter()
    left_out = []
    for entry in live:
        row = outcome.get((entry["bucket"], entry["row"]))
        said = row if row is not None else entry
        if said["reason"]:
            left_out.append({name: said[name] for name in ("reason", "detail")})
            left_out[-1]["key"] = entry["key"]
            duplicate += said["reason"] == "duplicate"
            rejected[said["reason"]] += said["reason"] != "duplicate"
        elif row is None:
            pending += 1
        else:
            buckets[entry["bucket"]] += 1
            was = units[entry["key"]] in before
            reused += was
            encoded += not was
    names = pa.schema([("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
    counts = Accounting(
        len(live),
        encoded,
        reused,
        duplicate,
        {reason: rejected[reason] for reason in sorted(+rejected)},
        pending,
        {bucket: buckets[bucket] for bucket in sorted(buckets)},
    )
    return counts, pa.Table.from_pylist(left_out, names)


def save_accounting(manifest: Manifest, generation: int, counts: Accounting) -> None:
    """Keep the sums that a build printed, so that `info` can give the same later."""
    value = {"generation": generation, **asdict(counts)}
    write_json(_path(manifest.root), value, manifest.staging)


def saved_accounting(root: Path, generation: int) -> Accounting | None:
    """The sums of the last build, if it ended well and the log has not moved on since."""
    try:
        value: dict[str, Any] = json.loads(_path(root).read_bytes())
    except FileNotFoundError:
        return None
    return Accounting(**value) if value.pop("generation") == generation else None


def _path(root: Path) -> Path:
    return root / "manifest" / "accounting.json"
