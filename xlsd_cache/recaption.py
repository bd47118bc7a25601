"""`xlsd-cache captions`: caption columns added or replaced, matched by name, no latent touched."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from numpy.typing import NDArray

from xlsd_cache import UserError
from xlsd_cache.accounting import save_accounting, saved_accounting
from xlsd_cache.blocks import in_blocks
from xlsd_cache.captions import Column, read_captions
from xlsd_cache.config import CaptionsConfig
from xlsd_cache.delta import caption_changes
from xlsd_cache.durable import sweep
from xlsd_cache.identity import read_attributes
from xlsd_cache.index import make_view, save_view
from xlsd_cache.manifest import CAPTIONS, PLAN, Manifest
from xlsd_cache.match import SUFFIX, look_up, match, only_once, stems
from xlsd_cache.records import Record, Search, Tally
from xlsd_cache.sources import named_roots, read_urls, records_of
from xlsd_cache.tables import Rows, is_table, one, read_rows
from xlsd_cache.terminal import say, warn

_BLOCK = 256  # files a thread takes at once


@dataclass(frozen=True)
class Changes:
    """What one column's captions would become."""

    column: str
    delta: pa.Table  # manifest.CAPTIONS
    added: int
    changed: int
    cleared: int
    kept: int  # the same as before
    bare: int  # images that the sources have no caption for
    unmatched: int  # captions that belong to no image

    def __str__(self) -> str:
        cleared = f", {self.cleared} cleared" if self.cleared else ""
        return (
            f"{self.column}: {self.added} added, {self.changed} changed, {self.kept} kept{cleared}"
            f"; {self.bare} images without one, {self.unmatched} captions without an image"
        )


def recaption(config: CaptionsConfig) -> list[Changes]:
    """Log the captions as a generation of their own; returns what changed, a column each.

    Raises UserError, nothing being written, where no caption belongs to any image or the store
    cannot be written.
    """
    root = config.store.expanduser()
    _, rows_per_shard = read_attributes(root)
    columns = tuple(map(Column.parse, config.caption_columns))
    beside, tables = _read(config.source, columns)
    try:
        return _log(config, Manifest(root), rows_per_shard, columns, beside, tables)
    except OSError as error:
        raise UserError(
            f"cannot write {config.store}: {error.strerror or error}; its captions are as they "
            f"were, so mend that and run the same command again"
        ) from error


def _log(
    config: CaptionsConfig,
    manifest: Manifest,
    rows_per_shard: int,
    columns: tuple[Column, ...],
    beside: pa.Table,
    tables: list[Rows],
) -> list[Changes]:
    root = manifest.root
    with FileLock(manifest.staging / "plan.lock"):
        generations = manifest.generations()
        if not generations:
            raise UserError(f"{root} is not planned yet; run `xlsd-cache build` to finish it")
        newest = generations[-1]
        images = _images(manifest.live(newest))
        matched = _match_rows(tables, images)
        known = manifest.captions(newest)
        changes = [
            _changes(column, images, known, beside, matched, clear=config.clear_missing)
            for column in columns
        ]
        for change in changes:
            say(change)
        if not any(change.added + change.changed + change.kept for change in changes):
            raise UserError(
                f"no caption in {', '.join(config.source)} belongs to an image of {root}; name "
                f"--columns that are there, and files or rows by the images' keys, paths or stems"
            )
        delta = pa.concat_tables([change.delta for change in changes])
        if config.dry_run or not delta.num_rows:
            print("nothing written")
            return changes
        sweep(manifest.staging)
        counts = saved_accounting(root, newest)
        manifest.write_plan(newest + 1, PLAN.empty_table(), [], delta)
        if counts is not None:  # no image changed: the last build's sums still hold
            save_accounting(manifest, newest + 1, counts)
    view = make_view(manifest, newest + 1, rows_per_shard)
    if not view.pending:
        save_view(root, view)
    return changes


def _read(sources: tuple[str, ...], columns: tuple[Column, ...]) -> tuple[pa.Table, list[Rows]]:
    """CAPTIONS of the files that hold captions, keys without suffix, and the tables of rows."""
    tally, remarks = Tally(), Counter[tuple[str, str]]()
    suffixes = frozenset(column.suffix for column in columns if column.suffix)
    rows = any(column.suffix is None for column in columns)

    def is_caption(name: str) -> bool:
        return any(name.endswith(f".{suffix}") for suffix in suffixes)

    search = Search(is_caption, suffixes, rows)
    captions, tables = [CAPTIONS.empty_table()], []
    for name, root in named_roots(sources).items():
        if is_table(root.name):
            tally.tables.append(root)
            continue
        stream = records_of(name, root, None, search, tally)
        for texts, said in in_blocks(partial(_read_block, columns=columns), stream, _BLOCK, 8):
            captions.append(texts)
            remarks.update(said)
    for file in tally.tables:
        tables.append(read_rows(file, columns))
        remarks.update(tables[-1].remarks)
        if tables[-1].damage:
            tally.damaged.append(f"{file} is damaged: {tables[-1].damage}; the rest is used")
    for sentence in tally.damaged:
        warn(f"WARNING: {sentence}")
    for (column, what), count in sorted(remarks.items()):
        say(f"{column}: {count} {what}")
    return pa.concat_tables(captions).combine_chunks(), tables


def _read_block(
    records: Iterable[Record], columns: tuple[Column, ...]
) -> tuple[pa.Table, Counter[tuple[str, str]]]:
    """Here a record is a file that holds captions, of the columns that its suffix says."""
    remarks = Counter[tuple[str, str]]()
    keys, names, texts = [], [], []
    for record in records:
        mine = tuple(c for c in columns if c.suffix and record.key.endswith(f".{c.suffix}"))
        found, said = read_captions(mine, record.beside)
        remarks.update(said)
        for column in mine:
            if column.name in found:
                keys.append(record.key.removesuffix(f".{column.suffix}"))
                names.append(column.name)
                texts.append(found[column.name])
    arrays = [pa.array(values, pa.string()) for values in (keys, names, texts)]
    return pa.Table.from_arrays(arrays, schema=CAPTIONS), remarks


def _images(live: pa.Table) -> pa.Table:
    """What match.match needs of all images that the log knows, and whether they have a place."""
    relative = pc.replace_substring_regex(one(live["key"]), "^[^/]*/", "")
    relative = pc.replace_substring_regex(relative, SUFFIX, "")
    url = pa.nulls(live.num_rows, pa.string())
    placed = pc.greater_equal(live["row"], 0)
    return pa.table([live["key"], live["source"], relative, url, placed],
                    names=["key", "source", "relative", "url", "placed"])  # fmt: skip


def _changes(
    column: Column,
    images: pa.Table,
    known: pa.Table,
    beside: pa.Table,
    matched: list[tuple[Rows, NDArray[np.int64]]],
    *,
    clear: bool,
) -> Changes:
    """Match one column's captions with the images, and those with the log's."""
    keys = one(images["key"])
    mine = beside.filter(pc.equal(beside["column"], column.name))
    at = _match_files(mine, images)
    texts = one(mine["text"]).take(pa.array(at, mask=at < 0))
    offered, used = mine.num_rows, len(np.unique(at[at >= 0]))
    for rows, at in matched:
        if column.name not in rows.captions:
            continue
        given = rows.captions[column.name]
        texts = pc.coalesce(given.take(pa.array(at, mask=at < 0)), texts)
        offered += len(given.drop_null())
        used += len(given.take(pa.array(np.unique(at[at >= 0]))).drop_null())
    has = pc.is_valid(texts)
    chosen = keys if clear else keys.filter(has)
    given_texts = texts.drop_null()
    named = pa.repeat(column.name, len(given_texts))
    found = pa.table([keys.filter(has), named, given_texts], schema=CAPTIONS)
    delta = caption_changes(chosen, found, (column.name,), known)
    before = known.filter(pc.equal(known["column"], column.name))
    had = look_up(one(delta["key"]), one(before["key"])) >= 0
    empty = pc.equal(delta["text"], "").to_numpy()
    placed = one(images["placed"])
    return Changes(
        column.name,
        delta,
        added=int((~had & ~empty).sum()),
        changed=int((had & ~empty).sum()),
        cleared=int(empty.sum()),
        kept=found.num_rows - int((~empty).sum()),
        bare=int(pc.sum(pc.and_(placed, pc.invert(has))).as_py() or 0),
        unmatched=offered - used,
    )


def _match_rows(tables: list[Rows], images: pa.Table) -> list[tuple[Rows, NDArray[np.int64]]]:
    """Each table with the row of every image, or -1.

    Where an image is from is read beside it only when no name of it was found: a million such
    files take longer than all the rest.
    """
    matched = [(rows, match(rows, images)) for rows in tables]
    unnamed = np.zeros(images.num_rows, bool)
    for rows, at in matched:
        unnamed |= (at < 0) & rows.names_urls
    if not unnamed.any():
        return matched
    sources = images["source"].filter(pa.array(unnamed)).to_pylist()
    urls = pc.replace_with_mask(one(images["url"]), pa.array(unnamed), read_urls(sources))
    images = images.set_column(images.schema.get_field_index("url"), "url", urls)
    return [(rows, match(rows, images)) for rows in tables]


def _match_files(captions: pa.Table, images: pa.Table) -> NDArray[np.int64]:
    """For each image its row of `captions`, whose keys have no suffix, or -1.

    By source and path; else by path in any source, and by stem, where that names one file and one
    path.
    """
    have = one(captions["key"])
    inside = pc.replace_substring_regex(have, "^[^/]*/", "")
    relative = one(images["relative"])
    key = pc.replace_substring_regex(one(images["key"]), SUFFIX, "")
    at = look_up(key, have)
    for wanted, there in (
        (relative, only_once(inside)),
        (only_once(stems(relative)), only_once(stems(inside))),
    ):
        at = np.where(at < 0, look_up(wanted, there), at)
    return at
