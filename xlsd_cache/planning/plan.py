"""Compares the scan with the log and makes the next generation: what is new, changed or gone."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.errors import UserError
from xlsd_cache.images.buckets import Buckets
from xlsd_cache.images.header import MAX_PIXELS
from xlsd_cache.planning.assign import assign_buckets, assign_rows, crop_matrix
from xlsd_cache.planning.caption_diff import caption_changes
from xlsd_cache.planning.log_state import LogState, set_plan_column
from xlsd_cache.planning.probe import FILES, read_hashes, read_headers
from xlsd_cache.planning.unchanged import SCANNED, Classified, Mask, among, classify, equal
from xlsd_cache.runtime.arrow import (
    counts,
    filtered,
    last_lines,
    lookup,
    lookup_rows,
    merge_rows,
    repeated,
    take_or_null,
)
from xlsd_cache.schema import LATER, PLACE, PLAN

# Files in staging that hold what a planning has read so far, until its plan is written. --rehash
# has its own: it trusts nothing that was read before it began.
JOURNALS = ("headers.planning", "hashes.planning", "headers.rehash", "hashes.rehash")


@dataclass(frozen=True)
class GenerationPlan:
    """The next generation, not yet written."""

    entries: pa.Table  # PLAN of images that are new, changed, moved, renamed, rejected, duplicates
    fresh: Mask  # the entries that are to be encoded; the others keep a latent or have none
    removed: list[str]  # keys that the scan no longer found, trained on or not
    leaving: pa.Table  # (key, reason): images trained on until now; reason empty where removed
    captions: pa.Table  # CAPTIONS that changed

    @property
    def is_empty(self) -> bool:
        """Whether the log already has all that the scan found."""
        return not (self.entries.num_rows or self.removed or self.captions.num_rows)


@dataclass(frozen=True)
class _Changed:
    """The images that the log's line may no longer hold for, aligned."""

    images: pa.Table  # IMAGES
    logged: pa.Table  # PLAN, null where new
    facts: pa.Table  # HEADERS and content_hash, empty where not known yet
    copies: Mask  # duplicates as the log has them, whose original may be gone


def make_plan(
    images: pa.Table,
    captions: pa.Table,
    columns: tuple[str, ...],
    state: LogState,
    buckets: Buckets,
    workers: int,
    staging: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    rehash: bool = False,
) -> GenerationPlan:
    """What brings the log up to the scan: its `images` (IMAGES), and `captions` in `columns`.

    An image is unchanged where size and times are as logged, see unchanged.py. Otherwise its
    content decides: encoded before, it keeps that latent under its new name; equal to a live image,
    it is a duplicate; else it gets a new row after its bucket's last shard. What is read of files
    is journaled in `staging`, if given.
    """
    # First, while nothing else takes memory: it has all texts twice.
    captions = caption_changes(images["key"].combine_chunks(), captions, columns, state.captions)
    names = JOURNALS[2:] if rehash else JOURNALS[:2]
    header_journal, hash_journal = (staging and staging / name for name in names)
    logged = take_or_null(state.live, lookup(images["key"], state.live["key"]))
    classified = classify(images, logged, max_pixels, rehash, hash_journal, workers)
    changed = _read_changed(images, logged, classified, header_journal, workers, max_pixels)
    kept, moved = _kept(images, logged, classified)

    entries = assign_buckets(changed.images, changed.facts, buckets, max_pixels)
    hashes, kept_hashes = _content_hashes(entries, changed, kept, state, hash_journal, workers)
    entries = _admit_encoded(entries, hashes, state)
    entries = _mark_duplicates(entries, hashes, kept, kept_hashes)
    entries, fresh = assign_rows(entries, hashes, state)

    differs = fresh | ~_same_lines(entries, changed.logged, rehash)
    entries, fresh = entries.filter(pa.array(differs)), fresh[differs]
    is_gone = pc.invert(pc.is_in(state.live["key"], value_set=images["key"]))
    removed = state.live.filter(is_gone)
    entries = pa.concat_tables([moved, entries])
    return GenerationPlan(
        entries,
        np.concatenate([np.zeros(moved.num_rows, bool), fresh]),
        removed["key"].to_pylist(),
        _leaving(state, removed, entries),
        captions,
    )


def contents(plan: GenerationPlan, state: LogState) -> pa.Table:
    """(key, content_hash) of all images as they are with this plan, where the hash is known."""
    names = ["key", "content_hash"]
    placed = plan.entries.filter(pc.equal(plan.entries["reason"], ""))
    table = pa.concat_tables([state.live.select(names), placed.select(names)])
    table = table.filter(pc.not_equal(table["content_hash"], ""))
    return last_lines(table, ["key"])


def keep_unread_captions(captions: pa.Table) -> pa.Table:
    """Caption changes without removals of what may be in a table that could not be read."""
    rows = pc.match_substring_regex(captions["column"], "^(jsonl|csv|parquet|arrow):")
    gone = pc.and_(rows, pc.equal(captions["text"], ""))
    return captions.filter(pc.invert(gone))


def _leaving(state: LogState, removed: pa.Table, entries: pa.Table) -> pa.Table:
    """(key, reason) of the images whose latent no image has any more.

    A renamed image's latent goes to its new name, and a removed original's to its duplicate.
    """
    rejected = entries.filter(pc.not_equal(entries["reason"], ""))
    gone = [removed]
    if rejected.num_rows:
        gone.append(state.live.filter(pc.is_in(state.live["key"], value_set=rejected["key"])))
    gone = pa.concat_tables(gone)
    gone = gone.filter(pc.equal(gone["reason"], ""))
    gone = gone.filter(pa.array(lookup_rows(gone, state.content, PLACE) >= 0))
    gone = gone.filter(pa.array(lookup_rows(gone, entries, PLACE) < 0))
    reason = take_or_null(rejected["reason"], lookup(gone["key"], rejected["key"]))
    return pa.table({"key": gone["key"], "reason": pc.fill_null(reason, "")})


def refuse_lost_sources(
    plan: GenerationPlan, state: LogState, names: Set[str], forget: Set[str]
) -> None:
    """Raise UserError where an earlier source is missing and its images would leave training.

    A source that was renamed is let pass: most of its latents go on under new names.
    """
    lost = _owners(plan.leaving.filter(pc.equal(plan.leaving["reason"], "")))
    if lost.keys() <= names | forget:
        return
    removed = pc.is_in(state.live["key"], value_set=pa.array(plan.removed, pa.string()))
    removed = state.live.filter(removed)
    had = _owners(removed.filter(pa.array(lookup_rows(removed, state.content, PLACE) >= 0)))
    for name, count in lost.items():
        if name not in names | forget and 2 * count > had[name]:
            raise UserError(
                f"the store has {count} images of the source {name!r}, which is not among the "
                f"sources now; add it, or use --forget {name} to drop its images from training"
            )


def _owners(images: pa.Table) -> dict[str, int]:
    """Source name -> number of its images."""
    owners = pc.replace_substring_regex(images["key"], "/.*", "")
    return counts(owners)


def _read_changed(
    images: pa.Table,
    logged: pa.Table,
    classified: Classified,
    journal: Path | None,
    workers: int,
    max_pixels: int,
) -> _Changed:
    """Read the headers of what is new or changed.

    The log has the facts of copies, and the scan those of what it refuses.
    """
    where = ~classified.unchanged
    images, logged = images.filter(pa.array(where)).combine_chunks(), logged.filter(pa.array(where))
    refused, copies = classified.refused[where], classified.copies[where]
    unread = refused | copies
    headers = read_headers(images.filter(pa.array(~unread)), journal, workers, max_pixels)
    read = headers.append_column("content_hash", pa.repeat("", headers.num_rows))
    known, out = logged.filter(pa.array(copies)), images.filter(pa.array(refused))
    none, empty = pa.repeat("", known.num_rows), pa.repeat("", out.num_rows)
    side = pa.repeat(pa.scalar(SCANNED, pa.int32()), out.num_rows)
    of_copies = [known["width"], known["height"], none, none, none, known["content_hash"]]
    of_refused = [side, side, out["reason"], out["detail"], empty, empty]
    tables = [read, *(pa.table(it, schema=read.schema) for it in (of_copies, of_refused))]
    facts = merge_rows(tables, [np.flatnonzero(mask) for mask in (~unread, copies, refused)])
    hashes = classified.hashes.filter(pa.array(where))
    hashes = pc.if_else(pa.array(copies), facts["content_hash"], hashes)
    facts = facts.set_column(facts.num_columns - 1, "content_hash", hashes)
    return _Changed(images, logged, facts, copies)


def _kept(images: pa.Table, logged: pa.Table, found: Classified) -> tuple[pa.Table, pa.Table]:
    """The log's lines that stay, with today's source and times; those among them to log again."""
    kept = logged = filtered(logged, found.unchanged)
    images = filtered(images.select(["source", "inode", "ctime_ns"]), found.unchanged)
    for name in images.column_names:
        kept = set_plan_column(kept, name, images[name])
    is_moved = ~equal(kept, logged, "source") | found.new_times[found.unchanged]
    return kept, kept.filter(pa.array(is_moved))


def _content_hashes(
    entries: pa.Table,
    changed: _Changed,
    kept: pa.Table,
    state: LogState,
    journal: Path | None,
    workers: int,
) -> tuple[pa.Array, pa.Array]:
    """Content hashes of the entries that can equal another image, and of what they can equal.

    Equal files have equal sizes and equal first bytes, so most files are not read twice.
    """
    size, facts = entries["size"].to_numpy(), changed.facts
    # What is over the limit may have been encoded under another.
    placed = among(entries["reason"], {"", "too_many_pixels"})
    unknown = pc.equal(facts["content_hash"], "").to_numpy()
    kept_size = kept["size"].to_numpy()
    has_hash = pc.not_equal(kept["content_hash"], "").to_numpy()
    others = [state.content["size"].to_numpy(), kept_size, size[changed.copies]]
    is_taken = np.isin(size, np.concatenate(others))
    sizes = pc.cast(entries["size"], pa.string())
    looks = pc.binary_join_element_wise(sizes, facts["head"], "+").combine_chunks()
    twins = np.asarray(pc.is_in(looks, value_set=repeated(looks)))
    wanted = placed & unknown & (is_taken | twins)
    rivals = ~has_hash & np.isin(kept_size, size[placed]) & (kept["row"].to_numpy() >= 0)
    to_read = [entries.filter(pa.array(wanted)), kept.filter(pa.array(rivals))]
    read = read_hashes(pa.concat_tables([t.select(FILES) for t in to_read]), journal, workers)
    count = int(wanted.sum())
    return (
        _scatter(facts["content_hash"], wanted, read.slice(0, count)),
        _scatter(kept["content_hash"], rivals, read.slice(count)),
    )


def _scatter(values: pa.ChunkedArray, mask: Mask, new: pa.Array) -> pa.Array:
    return pc.replace_with_mask(values.combine_chunks(), pa.array(mask), new)


def _admit_encoded(entries: pa.Table, hashes: pa.Array, state: LogState) -> pa.Table:
    """Encoded images stay, though they are over a limit that was lowered since."""
    over = pc.equal(entries["reason"], "too_many_pixels")
    if not pc.any(over).as_py():
        return entries
    over = pc.and_(over, pc.is_in(hashes, value_set=state.content["content_hash"]))
    for name in ("reason", "detail"):
        entries = set_plan_column(entries, name, pc.if_else(over, "", entries[name]))
    return entries


def _mark_duplicates(
    entries: pa.Table, hashes: pa.Array, kept: pa.Table, kept_hashes: pa.Array
) -> pa.Table:
    """Entries with a live image's content become its duplicates, with all known content hashes.

    Of several new ones the first by key is the original.
    """
    placed = pc.and_(pc.equal(entries["reason"].combine_chunks(), ""), pc.not_equal(hashes, ""))
    own = pc.if_else(placed, hashes, None)
    claimed = pc.if_else(pc.greater_equal(kept["row"].combine_chunks(), 0), kept_hashes, None)
    original = lookup(own, pc.if_else(pc.equal(claimed, ""), None, claimed))
    first = pc.index_in(own, value_set=own, skip_nulls=True)
    later = np.asarray(pc.fill_null(pc.less(first, pa.array(np.arange(len(own)))), False))
    is_copy = (original >= 0) | later
    keys = entries["key"].combine_chunks()
    originals = pc.coalesce(take_or_null(kept["key"].combine_chunks(), original), keys.take(first))
    values = {
        "content_hash": hashes,
        "bucket": pc.if_else(is_copy, "", entries["bucket"]),
        "reason": pc.if_else(is_copy, "duplicate", entries["reason"]),
        "detail": pc.if_else(is_copy, originals, entries["detail"]),
    }
    for name, column in values.items():
        entries = set_plan_column(entries, name, column)
    return entries


def _same_lines(a: pa.Table, b: pa.Table, strict: bool) -> Mask:
    """Whether each row is equal in every column.

    Times that `b`, the log, lacks count as equal unless `strict`.
    """
    same: Mask = np.all(crop_matrix(a["crop"]) == crop_matrix(b["crop"]), axis=1)
    for name in PLAN.names:
        if name != "crop":
            missing = name in LATER and not strict
            same &= equal(a, b, name) | (missing & np.asarray(pc.is_null(b[name])))
    return same
