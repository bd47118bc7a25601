"""The log (plans, commit records, captions) folded into tables, for planning."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.runtime.arrow import filtered, last_lines, lookup_rows, take_or_null
from xlsd_cache.schema import PLACE, PLAN, PlanEntry
from xlsd_cache.store.manifest import Manifest, ShardId

CONTENT = pa.schema(
    [PLAN.field(name) for name in ("content_hash", "size", "bucket", "row", "crop")]
)
FORMER = pa.schema([PLAN.field(name) for name in ("key", "source", "content_hash")])
_OUTCOME = ["row", "content_hash", "status", "reason", "detail"]  # of COMMIT
_FORMER_LINES = ["key", "source", "bucket", "row", "reason", "content_hash"]


@dataclass(frozen=True)
class LogState:
    """What the log says, as tables: a million images are too many for dictionaries."""

    live: pa.Table  # PLAN, a row a key; content_hash, reason and detail as committed
    content: pa.Table  # CONTENT, a row a content hash that has a good latent, live or not
    next_rows: dict[str, int]  # bucket -> the first row of its next shard
    captions: pa.Table  # CAPTIONS, the current text of each


def read_log_state(manifest: Manifest, rows_per_shard: int) -> LogState:
    """Fold the log, which is empty for a new store."""
    generation = max(manifest.generations(), default=-1)
    commits = manifest.commits(manifest.committed(), _OUTCOME)
    live = _as_committed(manifest.live(generation), commits)
    planned = manifest.plan_lines(generation, CONTENT.names)
    planned = filtered(planned, pc.greater_equal(planned["row"], 0))
    at = lookup_rows(planned, commits, PLACE)
    outcome = take_or_null(commits.select(["content_hash", "status"]), at)
    content = planned.set_column(0, "content_hash", outcome["content_hash"])
    content = filtered(content, pc.equal(outcome["status"], "encoded"))
    # A commit record that was rebuilt by --repair may lack the hash.
    content = filtered(content, pc.not_equal(content["content_hash"], ""))
    is_good = lookup_rows(content, manifest.damaged(generation), PLACE) < 0
    content = filtered(content, is_good)
    content = last_lines(content, ["content_hash"])
    next_rows = next_free_rows(planned, rows_per_shard)
    return LogState(live, content, next_rows, manifest.captions(generation))


def read_live(manifest: Manifest, generation: int) -> pa.Table:
    """PLAN of a generation's images; content_hash, reason and detail as committed."""
    commits = manifest.commits(manifest.committed(), _OUTCOME)
    return _as_committed(manifest.live(generation), commits)


def _as_committed(live: pa.Table, commits: pa.Table) -> pa.Table:
    rows = lookup_rows(live, commits, PLACE)
    for name in ("content_hash", "reason", "detail"):
        committed = take_or_null(commits[name], rows)
        if name == "content_hash":  # empty where the image was rejected without being read
            committed = pc.if_else(pc.equal(committed, ""), None, committed)
        live = set_plan_column(live, name, pc.coalesce(committed, live[name]))
    return live


def set_plan_column(entries: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    """The table (PLAN) with one column replaced."""
    return entries.set_column(PLAN.get_field_index(name), PLAN.field(name), column)


def former_names(manifest: Manifest, rows_per_shard: int, present: pa.Array) -> pa.Table:
    """FORMER of images that were encoded, or are duplicates, under keys that are not `present`.

    A (key, source) that had several contents comes with its last.
    """
    lines = manifest.plan_lines(max(manifest.generations(), default=-1), _FORMER_LINES)
    is_present = pc.is_in(lines["key"], value_set=present)
    lines = lines.filter(pc.and_(pc.is_valid(lines["row"]), pc.invert(is_present)))
    wanted = set(pc.unique(shard_names(lines, rows_per_shard)).to_pylist())
    units = {unit for unit in manifest.committed() if unit.name in wanted}
    commits = manifest.commits(units, ["row", "content_hash", "status"])
    commits = commits.filter(pc.equal(commits["status"], "encoded"))
    rows = lookup_rows(lines, commits, PLACE)
    is_duplicate = pc.equal(lines["reason"], "duplicate")
    contents = pc.coalesce(
        take_or_null(commits["content_hash"], rows),
        pc.if_else(is_duplicate, lines["content_hash"], ""),
    )
    former = pa.table([lines["key"], lines["source"], contents], schema=FORMER)
    former = former.filter(pc.not_equal(contents, ""))
    return last_lines(former, ["key", "source"])


def shard_names(table: pa.Table, rows_per_shard: int) -> pa.ChunkedArray:
    """ShardId.name of each row's shard; ".0" where an image has no row."""
    shard = pc.cast(pc.divide(table["row"], rows_per_shard), pa.string())
    return pc.binary_join_element_wise(table["bucket"], shard, ".")


def is_committed(manifest: Manifest, table: pa.Table, rows_per_shard: int) -> pa.ChunkedArray:
    """Whether the shard of each row of `table` (PLAN) has a commit record."""
    committed = pa.array([unit.name for unit in manifest.committed()], pa.string())
    return pc.is_in(shard_names(table, rows_per_shard), value_set=committed)


def uncommitted(manifest: Manifest, planned: pa.Table, rows_per_shard: int) -> pa.Table:
    """The rows of `planned` (PLAN) that are in a shard without a commit record."""
    planned = planned.filter(pc.greater_equal(planned["row"], 0))
    return planned.filter(pc.invert(is_committed(manifest, planned, rows_per_shard)))


def by_shard(entries: list[PlanEntry], rows_per_shard: int) -> dict[ShardId, dict[int, PlanEntry]]:
    """The entries of each shard, by slot."""
    units: dict[ShardId, dict[int, PlanEntry]] = {}
    for entry in entries:
        shard, slot = divmod(entry["row"], rows_per_shard)
        units.setdefault(ShardId(entry["bucket"], shard), {})[slot] = entry
    return units


def next_free_rows(planned: pa.Table, rows_per_shard: int) -> dict[str, int]:
    """Bucket -> first row after its last shard; `planned` has the columns bucket and row."""
    last = planned.group_by("bucket").aggregate([("row", "max")])
    rows = zip(last["bucket"].to_pylist(), last["row_max"].to_pylist(), strict=True)
    return {bucket: (row // rows_per_shard + 1) * rows_per_shard for bucket, row in rows}
