"""The whole log folded for planning: what is live, which contents have a latent, what is said."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.schema import CAPTIONS, PLAN
from xlsd_cache.store.manifest import Manifest, Unit, last_of

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
    at = find_places(planned, committed)
    said = committed.take(pa.array(at, mask=at < 0))
    content = planned.set_column(
        planned.schema.get_field_index("content_hash"), "content_hash", said["content_hash"]
    ).filter(pc.fill_null(pc.equal(said["status"], "encoded"), False))
    content = content.filter(pc.not_equal(content["content_hash"], ""))  # of a mended record
    good = find_places(content, manifest.damaged(generation)) < 0
    content = last_of(content.filter(pa.array(good)).select(CONTENT.names), ["content_hash"])
    return Known(
        live, content, next_free_rows(planned, rows_per_shard), manifest.captions(generation)
    )


def read_live(manifest: Manifest, generation: int) -> pa.Table:
    """PLAN of the images of a generation, with what their commits say of them."""
    return _as_committed(manifest.live(generation), manifest.commits(manifest.committed()))


def _as_committed(live: pa.Table, committed: pa.Table) -> pa.Table:
    at = find_places(live, committed)
    for name in ("content_hash", "reason", "detail"):
        said = committed[name].take(pa.array(at, mask=at < 0))
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
    at = find_places(lines, committed)
    copies = pc.equal(lines["reason"], "duplicate")
    contents = pc.coalesce(
        committed["content_hash"].take(pa.array(at, mask=at < 0)),
        pc.if_else(copies, lines["content_hash"], ""),
    )
    named = pa.table([lines["key"], lines["source"], contents], schema=FORMER)
    return last_of(named.filter(pc.not_equal(contents, "")), ["key", "source"])


def find_places(wanted: pa.Table, have: pa.Table) -> NDArray[np.int64]:
    """For each row of `wanted` the row of `have` with the same (bucket, row), or -1."""
    if not (wanted.num_rows and have.num_rows):
        return np.full(wanted.num_rows, -1)
    names = pc.unique(have["bucket"])

    def places(table: pa.Table) -> NDArray[np.int64]:
        buckets = pc.fill_null(pc.index_in(table["bucket"], value_set=names), -1).to_numpy()
        places: NDArray[np.int64] = (buckets.astype(np.int64) << 40) + table["row"].to_numpy()
        return np.where(buckets < 0, -1, places)

    sought, there = places(wanted), places(have)
    order = np.argsort(there, kind="stable")
    at = order[np.minimum(np.searchsorted(there[order], sought), len(there) - 1)]
    return np.where((there[at] == sought) & (sought >= 0), at, -1)


def unit_names(table: pa.Table, rows_per_shard: int) -> pa.ChunkedArray:
    """manifest.Unit.name of each row's shard; of no unit where a row has no place."""
    shard = pc.cast(pc.divide(table["row"], rows_per_shard), pa.string())
    return pc.binary_join_element_wise(table["bucket"], shard, ".")


def uncommitted(manifest: Manifest, generation: int, rows_per_shard: int) -> pa.Table:
    """The planned rows (schema.PLAN) whose shard has no commit record yet."""
    planned = manifest.planned(generation)
    committed = pa.array([unit.name for unit in manifest.committed()], pa.string())
    names = unit_names(planned, rows_per_shard)
    return planned.filter(pc.invert(pc.is_in(names, value_set=committed)))


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
