"""Which image goes where: the scan compared with the log, written down as the next generation."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache import UserError
from xlsd_cache.buckets import Buckets
from xlsd_cache.decode import RETRIED
from xlsd_cache.delta import caption_changes
from xlsd_cache.headers import read_hashes, read_headers
from xlsd_cache.known import Known, find_places
from xlsd_cache.manifest import PLAN
from xlsd_cache.match import look_up
from xlsd_cache.place import crop_matrix, give_rows, place
from xlsd_cache.tables import one

Entry = dict[str, Any]  # one row of manifest.PLAN
Mask = NDArray[np.bool_]
# The journals of a planning, in staging until its plan is written.
JOURNALS = ("headers.planning", "hashes.planning")


@dataclass(frozen=True)
class Plan:
    """The next generation, not yet written."""

    entries: pa.Table  # PLAN of images that are new, changed, moved, renamed, rejected, duplicates
    removed: list[str]  # keys that the scan no longer found
    captions: pa.Table  # what changed of them

    @property
    def is_empty(self) -> bool:
        """Whether the log already says what the scan found."""
        return not (self.entries.num_rows or self.removed or self.captions.num_rows)


def make_plan(
    images: pa.Table,
    captions: pa.Table,
    columns: tuple[str, ...],
    known: Known,
    buckets: Buckets,
    workers: int,
    staging: Path | None = None,
) -> Plan:
    """What brings the log up to what the scan found: its `images`, and `captions` in `columns`.

    A file whose size and mtime are as logged counts as unchanged. Any other is told by its
    content: encoded before, it keeps that latent under its new name; equal to a live image, it is
    a duplicate; else it gets a row of its own behind its bucket's last shard. What is read of
    files is journaled in `staging`, if given.
    """
    journals = [staging and staging / name for name in JOURNALS]
    at = look_up(one(images["key"]), one(known.live["key"]))
    logged = known.live.take(pa.array(at, mask=at < 0))
    same = _equal(logged, images, "size") & _equal(logged, images, "mtime_ns")
    same &= ~_among(logged["reason"], RETRIED)
    copies = same & _among(logged["reason"], {"duplicate"})  # whose original may be gone
    settled = same & ~copies

    changed = images.filter(pa.array(~settled)).combine_chunks()
    copy = copies[~settled]
    facts = _facts(changed, logged.filter(pa.array(~settled)), copy, journals[0], workers)
    entries = place(changed, facts, buckets)
    kept = logged.filter(pa.array(settled))
    kept = kept.set_column(1, PLAN.field("source"), images["source"].filter(pa.array(settled)))
    hashes, kept_hashes = _hashes(entries, facts, copy, kept, known, journals[1], workers)
    entries = _settle_copies(entries, hashes, kept, kept_hashes)
    entries, fresh = give_rows(entries, hashes, known)
    said = known.live.take(pa.array(at[~settled], mask=at[~settled] < 0))
    news = pa.array(fresh | ~_same_rows(entries, said))
    was = known.live.take(pa.array(at[settled]))
    moved = pa.array(~_equal(kept, was, "source"))
    gone = pc.invert(pc.is_in(known.live["key"], value_set=one(images["key"])))
    return Plan(
        pa.concat_tables([kept.filter(moved), entries.filter(news)]),
        known.live["key"].filter(gone).to_pylist(),
        caption_changes(one(images["key"]), captions, columns, known.captions),
    )


def refuse_lost_sources(plan: Plan, known: Known, names: Set[str], forget: Set[str]) -> None:
    """Raise UserError where a source of before is not named and its images would leave training.

    A renamed source is another matter: most of its latents go on under new names.
    """
    removed = known.live.filter(
        pc.is_in(known.live["key"], value_set=pa.array(plan.removed, pa.string()))
    )
    removed = removed.filter(pa.array(find_places(removed, known.content) >= 0))
    owner = pc.replace_substring_regex(removed["key"], "/.*", "")
    kept = find_places(removed, plan.entries) >= 0
    for name in pc.unique(owner).to_pylist():
        mine = pc.equal(owner, name).to_numpy()
        lost = int((mine & ~kept).sum())
        if name not in names | forget and 2 * lost > mine.sum():
            raise UserError(
                f"the {lost} images of the source {name!r} are in the store and {name!r} is not "
                f"among the sources now; name it as well, or say --forget {name} to let its images "
                f"leave training"
            )


def _equal(a: pa.Table, b: pa.Table, column: str) -> Mask:
    """bool, false where either is null."""
    return np.asarray(pc.fill_null(pc.equal(a[column], b[column]), False))


def _among(column: pa.ChunkedArray, values: Set[str]) -> Mask:
    return np.asarray(pc.is_in(column, value_set=pa.array(sorted(values))))


def _facts(
    changed: pa.Table, logged: pa.Table, copy: Mask, journal: Path | None, workers: int
) -> pa.Table:
    """headers.HEADERS and content hash, where known, of changed files; the log has the copies'."""
    read = read_headers(changed.filter(pa.array(~copy)), journal, workers)
    unknown = pa.array([""] * read.num_rows, pa.string())
    read = read.append_column("content_hash", unknown)
    told = logged.filter(pa.array(copy))
    empty = pa.array([""] * told.num_rows, pa.string())
    arrays = [told["width"], told["height"], empty, empty, empty, told["content_hash"]]
    both = pa.concat_tables([read, pa.table(arrays, schema=read.schema)])
    order = np.empty(len(copy), np.int64)
    order[np.concatenate([np.flatnonzero(~copy), np.flatnonzero(copy)])] = np.arange(len(copy))
    return both.combine_chunks().take(pa.array(order))


def _hashes(
    entries: pa.Table,
    facts: pa.Table,
    copy: Mask,
    kept: pa.Table,
    known: Known,
    journal: Path | None,
    workers: int,
) -> tuple[pa.Array, pa.Array]:
    """Content hashes of the entries that can equal anything, and of what they can equal.

    Equal files have equal sizes and equal first bytes, so most files are not read twice.
    """
    size = entries["size"].to_numpy()
    placed = pc.equal(entries["reason"], "").to_numpy()
    kept_size = kept["size"].to_numpy()
    has_hash = pc.not_equal(kept["content_hash"], "").to_numpy()
    elsewhere = [known.content["size"].to_numpy(), kept_size, size[copy]]
    taken = np.isin(size, np.concatenate(elsewhere))
    sizes = pc.cast(one(entries["size"]), pa.string())
    looks = pc.binary_join_element_wise(sizes, one(facts["head"]), "+")
    twins = look_up(looks, looks) != np.asarray(pc.index_in(looks, value_set=looks))
    twins = np.asarray(pc.is_in(looks, value_set=looks.filter(pa.array(twins))))
    wanted = placed & ~copy & (taken | twins)
    rivals = ~has_hash & np.isin(kept_size, size[placed]) & (kept["row"].to_numpy() >= 0)
    files = ["key", "source", "size", "mtime_ns"]
    to_read = [entries.filter(pa.array(wanted)), kept.filter(pa.array(rivals))]
    read = read_hashes(pa.concat_tables([t.select(files) for t in to_read]), journal, workers)
    count = int(wanted.sum())
    return (
        _scatter(one(facts["content_hash"]), wanted, read.slice(0, count)),
        _scatter(one(kept["content_hash"]), rivals, read.slice(count)),
    )


def _scatter(values: pa.Array, mask: Mask, new: pa.Array) -> pa.Array:
    return pc.replace_with_mask(values, pa.array(mask), new)


def _settle_copies(
    entries: pa.Table, hashes: pa.Array, kept: pa.Table, kept_hashes: pa.Array
) -> pa.Table:
    """Entries with a live image's content become its duplicates.

    Of several new ones the first by key is the original.
    """
    placed = pc.and_(pc.equal(one(entries["reason"]), ""), pc.not_equal(hashes, ""))
    mine = pc.if_else(placed, hashes, None)
    claimed = pc.if_else(pc.greater_equal(one(kept["row"]), 0), kept_hashes, None)
    original = look_up(mine, pc.if_else(pc.equal(claimed, ""), None, claimed))
    first = pc.index_in(mine, value_set=mine, skip_nulls=True)
    later = np.asarray(pc.fill_null(pc.less(first, pa.array(np.arange(len(mine)))), False))
    copies = (original >= 0) | later
    told = pc.coalesce(
        one(kept["key"]).take(pa.array(original, mask=original < 0)),
        one(entries["key"]).take(first),
    )
    values = {
        "content_hash": hashes,
        "bucket": pc.if_else(copies, "", one(entries["bucket"])),
        "reason": pc.if_else(copies, "duplicate", one(entries["reason"])),
        "detail": pc.if_else(copies, told, one(entries["detail"])),
    }
    for name, column in values.items():
        entries = entries.set_column(PLAN.get_field_index(name), PLAN.field(name), column)
    return entries


def _same_rows(a: pa.Table, b: pa.Table) -> Mask:
    """Whether each row is the same in both, in every column."""
    same: Mask = np.all(crop_matrix(a["crop"]) == crop_matrix(b["crop"]), axis=1)
    for name in PLAN.names:
        if name != "crop":
            same &= _equal(a, b, name)
    return same
