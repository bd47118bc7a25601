"""`xlsd-cache captions`: add or replace caption columns by image name, without re-encoding."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column, read_captions
from xlsd_cache.integrity.accounting import save_accounting, saved_accounting
from xlsd_cache.options.captions import CaptionsOptions
from xlsd_cache.planning.caption_diff import caption_changes
from xlsd_cache.planning.log_state import former_names, read_live
from xlsd_cache.runtime.arrow import lookup
from xlsd_cache.runtime.atomic import sweep
from xlsd_cache.runtime.own_files import writing
from xlsd_cache.runtime.threads import map_blocks
from xlsd_cache.schema import PLAN
from xlsd_cache.sources.records import Record, Search, Tally, given_table
from xlsd_cache.sources.scan import named_roots, records_of
from xlsd_cache.sources.sidecars import read_urls
from xlsd_cache.store.index import make_snapshot, save_snapshot
from xlsd_cache.store.view import StoreView
from xlsd_cache.tables.columns import Rows, is_table
from xlsd_cache.tables.matching import by_former_names, captions_of, match
from xlsd_cache.tables.names import joined
from xlsd_cache.tables.row_outcomes import NO_IMAGE, Matches, Table

log = logging.getLogger("xlsd.cache.commands")

_BLOCK = 256  # files a thread takes at once


@dataclass(frozen=True)
class Changes:
    """What changes in one caption column."""

    column: str
    delta: pa.Table  # schema.CAPTIONS
    added: int
    changed: int
    cleared: int
    kept: int  # unchanged
    bare: int  # images without a caption in the sources
    unmatched: int  # captions without an image

    def __str__(self) -> str:
        cleared = f", {self.cleared} cleared" if self.cleared else ""
        return (
            f"{self.column}: {self.added} added, {self.changed} changed, {self.kept} kept{cleared}"
            f"; {self.bare} images without one, {self.unmatched} captions without an image"
        )


def recaption(config: CaptionsOptions) -> list[Changes]:
    """Write the captions as a generation; returns the changes of each column.

    Raises UserError, with nothing written, if no caption belongs to an image or the store cannot be
    written.
    """
    root = config.store.expanduser()
    store = StoreView.open(root)
    columns = tuple(map(Column.parse, config.caption_columns))
    tables = _read(config.source, columns)
    with writing(config.store, "Its captions are unchanged"):
        return _write(config, store, columns, tables)


def _write(
    config: CaptionsOptions,
    store: StoreView,
    columns: tuple[Column, ...],
    tables: list[Table],
) -> list[Changes]:
    manifest, root = store.manifest, store.manifest.root
    manifest.refuse_links()
    with FileLock(manifest.staging / "plan.lock"):
        manifest.fold()
        newest = manifest.generations()[-1]
        images = _images(manifest.live(newest))
        found = _match(tables, images)
        missing = pc.any(found.missing()).as_py()
        if missing or len(found.moved()):  # only then is the whole journal read
            images = _images(read_live(manifest, newest))
            _refuse_others(found, images)
        if missing:
            former = former_names(manifest, store.rows_per_shard, images["key"].combine_chunks())
            by_former_names(found, images["content_hash"].combine_chunks(), former)
        for line in found.summary():
            log.info(line)
        known = manifest.captions(newest)
        changes = [
            _changes(column, images, known, found, clear=config.clear_missing) for column in columns
        ]
        for change in changes:
            log.info(change)
        if not any(change.added + change.changed + change.kept for change in changes):
            raise UserError(
                f"no caption in {', '.join(config.source)} belongs to an image of {root}. Give "
                f"--columns that exist; files or rows match by an image's key, path or stem."
            )
        delta = pa.concat_tables([change.delta for change in changes])
        if config.dry_run or not delta.num_rows:
            log.info("nothing written")
            return changes
        sweep(manifest.staging)
        counts = saved_accounting(root, newest)
        manifest.write_plan(newest + 1, PLAN.empty_table(), [], delta)
        if counts is not None:  # no image changed, so the last build's sums hold
            save_accounting(manifest, newest + 1, counts)
    snapshot = make_snapshot(replace(store, generation=newest + 1))
    if not snapshot.pending:
        save_snapshot(root, snapshot)
    return changes


def _read(sources: tuple[str, ...], columns: tuple[Column, ...]) -> list[Table]:
    """Read the sources: tables as they are, caption files as one table a source."""
    tally = Tally()
    suffixes = frozenset(column.suffix for column in columns if column.suffix)
    rows = tuple(column for column in columns if column.suffix is None)

    def is_caption(name: str) -> bool:
        return any(name.endswith(f".{suffix}") for suffix in suffixes)

    search = Search(is_caption, suffixes, rows, images=False)
    sidecars = []
    for name, root in named_roots(sources).items():
        if is_table(root.name):
            given_table(name, root, search, tally)
            continue
        stream = records_of(name, root, search, tally)
        rows_ = _sidecars(root, stream, columns)
        sidecars.append(Table(rows_, root.as_posix(), name, given=True, sidecars=True))
    for sentence in tally.damaged:
        log.warning(sentence)
    tables = [*sidecars, *tally.tables]
    remarks = sum((table.rows.remarks for table in tables), Counter[tuple[str, str]]())
    for (column, what), count in sorted(remarks.items()):
        log.info(f"{column}: {count} {what}")
    return tables


def _sidecars(root: Path, stream: Iterator[Record], columns: tuple[Column, ...]) -> Rows:
    """One row a caption file; its key is the path in the source without suffix."""
    blocks = list(map_blocks(partial(_read_block, columns=columns), stream, _BLOCK, 8))
    keys = joined([block.key for block in blocks])
    texts = {it.name: joined([block.captions[it.name] for block in blocks]) for it in columns}
    remarks = sum((block.remarks for block in blocks), Counter[tuple[str, str]]())
    nothing = pa.nulls(len(keys), pa.string())
    return Rows(root, nothing, keys, nothing, nothing, texts, remarks)


def _read_block(records: list[Record], columns: tuple[Column, ...]) -> Rows:
    """Read a block of caption files; the suffix says which columns a file has."""
    remarks = Counter[tuple[str, str]]()
    keys: list[str] = []
    texts: dict[str, list[str | None]] = {column.name: [] for column in columns}
    for record in records:
        mine = [c for c in columns if c.suffix and record.key.endswith(f".{c.suffix}")]
        found, said = read_captions(tuple(mine), record.sidecar)
        remarks.update(said)
        suffix = max((f".{c.suffix}" for c in mine), key=len)
        keys.append(record.key.partition("/")[2].removesuffix(suffix))
        for column in columns:
            texts[column.name].append(found.get(column.name))
    nothing = pa.nulls(len(keys), pa.string())
    captions = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    return Rows(Path(), nothing, pa.array(keys, pa.string()), nothing, nothing, captions, remarks)


def _images(live: pa.Table) -> pa.Table:
    """The columns that tables.matching.match needs, and whether an image has a row."""
    url = pa.nulls(live.num_rows, pa.string())
    placed = pc.greater_equal(live["row"], 0)
    return pa.table([live["key"], live["source"], url, live["size"], live["content_hash"], placed],
                    names=["key", "source", "url", "size", "content_hash", "placed"])  # fmt: skip


def _changes(
    column: Column, images: pa.Table, known: pa.Table, found: Matches, *, clear: bool
) -> Changes:
    """Compare one column's captions with the journal's."""
    keys = images["key"].combine_chunks()
    told = captions_of(found, keys, (column.name,))
    has = pc.is_in(keys, value_set=told["key"])
    delta = caption_changes(keys if clear else keys.filter(has), told, (column.name,), known)
    before = known.filter(pc.equal(known["column"], column.name))
    had = lookup(delta["key"], before["key"]) >= 0
    empty = pc.equal(delta["text"], "").to_numpy()
    placed = images["placed"].combine_chunks()
    return Changes(
        column.name,
        delta,
        added=int((~had & ~empty).sum()),
        changed=int((had & ~empty).sum()),
        cleared=int(empty.sum()),
        kept=told.num_rows - int((~empty).sum()),
        bare=int(pc.sum(pc.and_(placed, pc.invert(has))).as_py() or 0),
        unmatched=found.without_image(column.name),
    )


def _refuse_others(found: Matches, images: pa.Table) -> None:
    """Drop captions that matched by key alone but belong to other images.

    The source was elsewhere when the store was built. If it has images next to these captions, they
    must be identical to the store's.
    """
    told = [images[name].combine_chunks() for name in ("key", "size", "content_hash")]
    for row in found.moved().tolist():
        key, size, content = (column[int(found.image[row])].as_py() for column in told)
        data = found.own_image(row, key)
        if data is not None and (len(data) != size or hashlib.sha256(data).hexdigest() != content):
            found.image[row] = NO_IMAGE


def _match(tables: list[Table], images: pa.Table) -> Matches:
    """Match each row with its image.

    The URL files next to the images are read only for images that no row matches otherwise: a
    million of them take longer than everything else.
    """
    found = match(tables, images)
    open_ = np.ones(images.num_rows, bool)
    open_[found.image[found.image >= 0]] = False
    if open_.any() and any(table.rows.names_urls for table in tables):
        sources = images["source"].filter(pa.array(open_)).to_pylist()
        urls = pc.replace_with_mask(images["url"], pa.array(open_), read_urls(sources))
        at = images.schema.get_field_index("url")
        found = match(tables, images.set_column(at, "url", urls))
    return found
