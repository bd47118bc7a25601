"""Which image goes where: the scan compared with the log, written down as the next generation."""

from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.errors import UserError
from xlsd_cache.images.buckets import Buckets
from xlsd_cache.images.decode import MAX_PIXELS
from xlsd_cache.planning.assign import crop_matrix, give_rows, place
from xlsd_cache.planning.caption_diff import caption_changes
from xlsd_cache.planning.log_state import Known
from xlsd_cache.planning.probe import FILES, read_hashes, read_headers
from xlsd_cache.planning.unchanged import SCANNED, Mask, among, compare, equal
from xlsd_cache.runtime.arrow import last_per_key, lookup, lookup_rows, take_or_null
from xlsd_cache.schema import LATER, PLACE, PLAN

Entry = dict[str, Any]  # one row of schema.PLAN
# What a planning read so far, in staging until its plan is written. Those of --rehash are apart: it
# believes nothing that was read before it began.
JOURNALS = ("headers.planning", "hashes.planning", "headers.rehash", "hashes.rehash")


@dataclass(frozen=True)
class Plan:
    """The next generation, not yet written."""

    entries: pa.Table  # PLAN of images that are new, changed, moved, renamed, rejected, duplicates
    fresh: Mask  # which entries are to be encoded, and not another line on an image of the log
    removed: list[str]  # keys that the scan no longer found, trained on or not
    leaving: pa.Table  # (key, reason): images trained on until now; reason empty where removed
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
    max_pixels: int = MAX_PIXELS,
    rehash: bool = False,
) -> Plan:
    """What brings the log up to what the scan found: its `images`, and `captions` in `columns`.

    A file whose size and times are as logged counts as unchanged, see unchanged.py. Any other is
    told by its content: encoded before, it keeps that latent under its new name; equal to a live
    image, it is a duplicate; else it gets a row of its own behind its bucket's last shard. What is
    read of files is journaled in `staging`, if given.
    """
    names = JOURNALS[2:] if rehash else JOURNALS[:2]
    headers, hashes = (staging and staging / name for name in names)
    at = lookup(images["key"], known.live["key"])
    logged = take_or_null(known.live, at)
    now = compare(images, logged, max_pixels, rehash, hashes, workers)

    open_, settled = pa.array(~now.settled), pa.array(now.settled)
    changed, said = images.filter(open_).combine_chunks(), logged.filter(open_)
    refused, copy = now.refused[~now.settled], now.copies[~now.settled]
    facts = _facts(changed, said, refused, copy, headers, workers, max_pixels)
    facts = _with_hashes(facts, now.hashes.filter(open_), ~copy)
    entries = place(changed, facts, buckets, max_pixels)
    kept = logged.filter(settled)
    for name in ("source", "inode", "ctime_ns"):
        column = images[name].filter(settled)
        kept = kept.set_column(PLAN.get_field_index(name), PLAN.field(name), column)
    contents, kept_contents = _hashes(entries, facts, copy, kept, known, hashes, workers)
    entries = _let_in_encoded(entries, contents, known)
    entries = _settle_copies(entries, contents, kept, kept_contents)
    entries, fresh = give_rows(entries, contents, known)
    news = fresh | ~_same_rows(entries, said, rehash)
    was = logged.filter(settled)
    moved = kept.filter(pa.array(~equal(kept, was, "source") | now.renewed[now.settled]))
    entries, fresh = entries.filter(pa.array(news)), fresh[news]
    entries = pa.concat_tables([moved, entries])
    removed = known.live.filter(pc.invert(pc.is_in(known.live["key"], value_set=images["key"])))
    return Plan(
        entries,
        np.concatenate([np.zeros(moved.num_rows, bool), fresh]),
        removed["key"].to_pylist(),
        _leaving(known, removed, entries),
        caption_changes(images["key"].combine_chunks(), captions, columns, known.captions),
    )


def contents(plan: Plan, known: Known) -> pa.Table:
    """(key, content_hash) of all images as they are with this plan, where they are known."""
    names = ["key", "content_hash"]
    placed = plan.entries.filter(pc.equal(plan.entries["reason"], ""))
    told = pa.concat_tables([known.live.select(names), placed.select(names)])
    told = told.filter(pc.not_equal(told["content_hash"], ""))
    return told.take(last_per_key(told, ["key"]))


def keep_unread_captions(plan: Plan) -> Plan:
    """The plan, but no caption ends that may be in a table that could not be read."""
    rows = pc.match_substring_regex(plan.captions["column"], "^(jsonl|csv|parquet|arrow):")
    gone = pc.and_(rows, pc.equal(plan.captions["text"], ""))
    return replace(plan, captions=plan.captions.filter(pc.invert(gone)))


def _leaving(known: Known, removed: pa.Table, entries: pa.Table) -> pa.Table:
    """(key, reason) of the images with a latent that is nobody's any more.

    A renamed image's latent is its new name's, and a duplicate's that of its original.
    """
    refused = entries.filter(pc.not_equal(entries["reason"], ""))
    gone = [removed]
    if refused.num_rows:
        were = pc.is_in(known.live["key"], value_set=refused["key"])
        gone.append(known.live.filter(were))
    gone = pa.concat_tables(gone)
    gone = gone.filter(pc.equal(gone["reason"], ""))
    gone = gone.filter(pa.array(lookup_rows(gone, known.content, PLACE) >= 0))
    gone = gone.filter(pa.array(lookup_rows(gone, entries, PLACE) < 0))
    at = lookup(gone["key"], refused["key"])
    reason = pc.fill_null(take_or_null(refused["reason"], at), "")
    return pa.table({"key": gone["key"], "reason": reason})


def refuse_lost_sources(plan: Plan, known: Known, names: Set[str], forget: Set[str]) -> None:
    """Raise UserError where a source of before is not named and its images would leave training.

    A renamed source is another matter: most of its latents go on under new names.
    """
    lost = _owners(plan.leaving.filter(pc.equal(plan.leaving["reason"], "")))
    if lost.keys() <= names | forget:
        return
    removed = pc.is_in(known.live["key"], value_set=pa.array(plan.removed, pa.string()))
    removed = known.live.filter(removed)
    had = _owners(removed.filter(pa.array(lookup_rows(removed, known.content, PLACE) >= 0)))
    for name, count in lost.items():
        if name not in names | forget and 2 * count > had[name]:
            raise UserError(
                f"the {count} images of the source {name!r} are in the store and {name!r} is not "
                f"among the sources now; name it as well, or say --forget {name} to let its images "
                f"leave training"
            )


def _owners(images: pa.Table) -> dict[str, int]:
    """Source name -> how many of the images are of it."""
    owners = pc.replace_substring_regex(images["key"].combine_chunks(), "/.*", "")
    return {count["values"]: count["counts"] for count in pc.value_counts(owners).to_pylist()}


def _facts(
    changed: pa.Table,
    logged: pa.Table,
    refused: Mask,
    copy: Mask,
    journal: Path | None,
    workers: int,
    max_pixels: int,
) -> pa.Table:
    """headers.HEADERS and content hash, where known, of changed files.

    The log has those of copies, and the scan says enough of what it refuses.
    """
    unread = copy | refused
    read = read_headers(changed.filter(pa.array(~unread)), journal, workers, max_pixels)
    read = read.append_column("content_hash", pa.repeat("", read.num_rows))
    told, out = logged.filter(pa.array(copy)), changed.filter(pa.array(refused))
    empty, none = pa.repeat("", told.num_rows), pa.repeat("", out.num_rows)
    arrays = [told["width"], told["height"], empty, empty, empty, told["content_hash"]]
    side = pa.repeat(pa.scalar(SCANNED, pa.int32()), out.num_rows)
    others = [side, side, out["reason"], out["detail"], none, none]
    tables = [read, *(pa.table(columns, schema=read.schema) for columns in (arrays, others))]
    order = np.empty(len(copy), np.int64)
    parts = [np.flatnonzero(mask) for mask in (~unread, copy, refused)]
    order[np.concatenate(parts)] = np.arange(len(copy))
    return pa.concat_tables(tables).combine_chunks().take(pa.array(order))


def _with_hashes(facts: pa.Table, hashes: pa.Array, where: Mask) -> pa.Table:
    """Facts with the content hashes that are known by now."""
    content = pc.if_else(pa.array(where), hashes, facts["content_hash"].combine_chunks())
    return facts.set_column(facts.num_columns - 1, "content_hash", content)


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
    placed = among(entries["reason"], {"", "too_many_pixels"})  # encoded under another limit?
    unknown = pc.equal(facts["content_hash"], "").to_numpy()
    kept_size = kept["size"].to_numpy()
    has_hash = pc.not_equal(kept["content_hash"], "").to_numpy()
    elsewhere = [known.content["size"].to_numpy(), kept_size, size[copy]]
    taken = np.isin(size, np.concatenate(elsewhere))
    sizes = pc.cast(entries["size"].combine_chunks(), pa.string())
    looks = pc.binary_join_element_wise(sizes, facts["head"].combine_chunks(), "+")
    twins = lookup(looks, looks) != np.asarray(pc.index_in(looks, value_set=looks))
    twins = np.asarray(pc.is_in(looks, value_set=looks.filter(pa.array(twins))))
    wanted = placed & unknown & (taken | twins)
    rivals = ~has_hash & np.isin(kept_size, size[placed]) & (kept["row"].to_numpy() >= 0)
    to_read = [entries.filter(pa.array(wanted)), kept.filter(pa.array(rivals))]
    read = read_hashes(pa.concat_tables([t.select(FILES) for t in to_read]), journal, workers)
    count = int(wanted.sum())
    return (
        _scatter(facts["content_hash"].combine_chunks(), wanted, read.slice(0, count)),
        _scatter(kept["content_hash"].combine_chunks(), rivals, read.slice(count)),
    )


def _scatter(values: pa.Array, mask: Mask, new: pa.Array) -> pa.Array:
    return pc.replace_with_mask(values, pa.array(mask), new)


def _let_in_encoded(entries: pa.Table, hashes: pa.Array, known: Known) -> pa.Table:
    """What is encoded stays, though its size is beyond a limit that was lowered since."""
    over = pc.equal(entries["reason"], "too_many_pixels")
    if not pc.any(over).as_py():
        return entries
    encoded = pc.is_in(hashes, value_set=known.content["content_hash"])
    over = pc.and_(over, encoded)
    for name in ("reason", "detail"):
        column = pc.if_else(over, "", entries[name])
        entries = entries.set_column(PLAN.get_field_index(name), PLAN.field(name), column)
    return entries


def _settle_copies(
    entries: pa.Table, hashes: pa.Array, kept: pa.Table, kept_hashes: pa.Array
) -> pa.Table:
    """Entries with a live image's content become its duplicates.

    Of several new ones the first by key is the original.
    """
    placed = pc.and_(pc.equal(entries["reason"].combine_chunks(), ""), pc.not_equal(hashes, ""))
    mine = pc.if_else(placed, hashes, None)
    claimed = pc.if_else(pc.greater_equal(kept["row"].combine_chunks(), 0), kept_hashes, None)
    original = lookup(mine, pc.if_else(pc.equal(claimed, ""), None, claimed))
    first = pc.index_in(mine, value_set=mine, skip_nulls=True)
    later = np.asarray(pc.fill_null(pc.less(first, pa.array(np.arange(len(mine)))), False))
    copies = (original >= 0) | later
    told = pc.coalesce(
        take_or_null(kept["key"].combine_chunks(), original),
        entries["key"].combine_chunks().take(first),
    )
    values = {
        "content_hash": hashes,
        "bucket": pc.if_else(copies, "", entries["bucket"].combine_chunks()),
        "reason": pc.if_else(copies, "duplicate", entries["reason"].combine_chunks()),
        "detail": pc.if_else(copies, told, entries["detail"].combine_chunks()),
    }
    for name, column in values.items():
        entries = entries.set_column(PLAN.get_field_index(name), PLAN.field(name), column)
    return entries


def _same_rows(a: pa.Table, b: pa.Table, strict: bool) -> Mask:
    """Whether each row is the same in both, in every column.

    Times that `b`, the log, lacks are the same unless `strict`.
    """
    same: Mask = np.all(crop_matrix(a["crop"]) == crop_matrix(b["crop"]), axis=1)
    for name in PLAN.names:
        if name != "crop":
            missing = name in LATER and not strict
            same &= equal(a, b, name) | (missing & np.asarray(pc.is_null(b[name])))
    return same
