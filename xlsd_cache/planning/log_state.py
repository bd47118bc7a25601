"""The whole log folded for planning: what is live, which contents have a latent, what is said."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.runtime.arrow import last_per_key, lookup_rows, take_or_null
from xlsd_cache.schema import CAPTIONS, PLACE, PLAN
from xlsd_cache.store.manifest import Manifest, Unit

CONTENT = pa.schema(
    [PLAN.field(name) for name in ("content_hash", "size", "bucket", "row", "crop")]
)
FORMER = pa.schema([PLAN.field(name) for name in ("key", "source", "content_hash")])
_FORMER_LINES = ["key", "source", "bucket", "row", "reason", "content_hash"]


@dataclass(frozen=True)
class Known:
    """What the log says. Tables, for a million images are too many for dictionaries."""

    live: pa.Table  # PLAN, a row a key; content_hash, reason and detail as committed
    content: pa.Table  # CONTENT, a row a content hash: its good latent's place, live or not
    next_rows: dict[str, int]  # bucket -> the first row of its next shard
    captions: pa.Table  # schema.CAPTIONS, the last said of each


NOTHING = Known(PLAN.empty_table(), CONTENT.empty_table(), {}, CAPTIONS.empty_table())


def read_known(manifest: Manifest, rows_per_shard: int) -> Known:
    """Fold the log; that of an empty store gives empty tables."""
    generation = max(manifest.generations(), default=-1)
    committed = manifest.commits(manifest.committed())
    live = _as_committed(manifest.live(generation), committed)
    planned = manifest.planned(generation)
    at = lookup_rows(planned, committed, PLACE)
    said = take_or_null(committed, at)
    content = planned.set_column(
        planned.schema.get_field_index("content_hash"), "content_hash", said["content_hash"]
    ).filter(pc.fill_null(pc.equal(said["status"], "encoded"), False))
    content = content.filter(pc.not_equal(content["content_hash"], ""))  # of a mended record
    good = lookup_rows(content, manifest.damaged(generation), PLACE) < 0
    content = content.filter(pa.array(good)).select(CONTENT.names)
    content = content.take(last_per_key(content, ["content_hash"]))
    return Known(
        live, content, next_free_rows(planned, rows_per_shard), manifest.captions(generation)
    )


def read_live(manifest: Manifest, generation: int) -> pa.Table:
    """PLAN of the images of a generation, with what their commits say of them."""
    return _as_committed(manifest.live(generation), manifest.commits(manifest.committed()))


def _as_committed(live: pa.Table, committed: pa.Table) -> pa.Table:
    at = lookup_rows(live, committed, PLACE)
    for name in ("content_hash", "reason", "detail"):
        said = take_or_null(committed[name], at)
        if name == "content_hash":  # of an image rejected unread
            said = pc.if_else(pc.equal(said, ""), None, said)
        live = live.set_column(
            live.schema.get_field_index(name), PLAN.field(name), pc.coalesce(said, live[name])
        )
    return live


def former_names(manifest: Manifest, rows_per_shard: int, present: pa.Array) -> pa.Table:
    """FORMER of images that were encoded, or duplicates of such, under names not `present` now.

    `present` are the keys of today. A name that had several contents is told with its last.
    """
    lines = manifest.plan_lines(max(manifest.generations(), default=-1), _FORMER_LINES)
    here = pc.is_in(lines["key"], value_set=present)
    lines = lines.filter(pc.and_(pc.is_valid(lines["row"]), pc.invert(here)))
    wanted = set(pc.unique(unit_names(lines, rows_per_shard)).to_pylist())
    units = {unit for unit in manifest.committed() if unit.name in wanted}
    committed = manifest.commits(units, ["row", "content_hash", "status"])
    committed = committed.filter(pc.equal(committed["status"], "encoded"))
    at = lookup_rows(lines, committed, PLACE)
    copies = pc.equal(lines["reason"], "duplicate")
    contents = pc.coalesce(
        take_or_null(committed["content_hash"], at),
        pc.if_else(copies, lines["content_hash"], ""),
    )
    named = pa.table([lines["key"], lines["source"], contents], schema=FORMER)
    named = named.filter(pc.not_equal(contents, ""))
    return named.take(last_per_key(named, ["key", "source"]))


def unit_names(table: pa.Table, rows_per_shard: int) -> pa.ChunkedArray:
    """manifest.Unit.name of each row's shard; of no unit where a row has no place."""
    shard = pc.cast(pc.divide(table["row"], rows_per_shard), pa.string())
    return pc.binary_join_element_wise(table["bucket"], shard, ".")


def is_committed(manifest: Manifest, table: pa.Table, rows_per_shard: int) -> pa.ChunkedArray:
    """Whether the shard of each row of `table` (PLAN) has a commit record."""
    committed = pa.array([unit.name for unit in manifest.committed()], pa.string())
    return pc.is_in(unit_names(table, rows_per_shard), value_set=committed)


def uncommitted(manifest: Manifest, generation: int, rows_per_shard: int) -> pa.Table:
    """The planned rows (PLAN) whose shard has no commit record yet."""
    planned = manifest.planned(generation)
    return planned.filter(pc.invert(is_committed(manifest, planned, rows_per_shard)))


def by_unit(
    entries: list[dict[str, Any]], rows_per_shard: int
) -> dict[Unit, dict[int, dict[str, Any]]]:
    """The entries of each shard, by slot."""
    units: dict[Unit, dict[int, dict[str, Any]]] = {}
    for entry in entries:
        shard, slot = divmod(entry["row"], rows_per_shard)
        units.setdefault(Unit(entry["bucket"], shard), {})[slot] = entry
    return units


def next_free_rows(planned: pa.Table, rows_per_shard: int) -> dict[str, int]:
    """Bucket -> first row after its last shard; `planned` has the columns bucket and row."""
    last = planned.group_by("bucket").aggregate([("row", "max")])
    rows = zip(last["bucket"].to_pylist(), last["row_max"].to_pylist(), strict=True)
    return {bucket: (row // rows_per_shard + 1) * rows_per_shard for bucket, row in rows}
