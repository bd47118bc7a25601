"""Scans any number of sources into a table of images and a table of captions, sorted by key."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column, read_captions
from xlsd_cache.files.folders import IMAGE_SUFFIXES, is_image
from xlsd_cache.runtime.arrow import counts, filtered, lookup, take_or_null
from xlsd_cache.runtime.threads import map_blocks
from xlsd_cache.schema import CAPTIONS, IMAGES
from xlsd_cache.sources.allowed_folders import AllowedFolders
from xlsd_cache.sources.filters import select_images
from xlsd_cache.sources.masks import with_masks
from xlsd_cache.sources.records import (
    ARCHIVE_SUFFIXES,
    Record,
    Search,
    Tally,
    archive_records,
    folder_records,
    given_table,
    row_records,
)
from xlsd_cache.sources.sidecars import url_of
from xlsd_cache.tables.columns import TABLE_SUFFIXES, is_table
from xlsd_cache.tables.matching import by_former_names, captions_of, match
from xlsd_cache.tables.row_outcomes import Matches

_BLOCK = 256  # records per task of a thread


# Candidates of --captions auto, which takes the one that most images have.
AUTO = ("txt", *(f"{kind}:{name}" for kind in ("jsonl", "csv", "parquet")
                 for name in ("text", "caption")))  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """The images and captions of all sources, and what was passed over."""

    images: pa.Table  # IMAGES, sorted by key
    captions: pa.Table  # schema.CAPTIONS, of these images
    columns: tuple[str, ...]  # of the captions
    names: tuple[str, ...]  # of the sources, with which keys start
    passed_over: Counter[str]  # kind -> files that are neither images nor captions
    remarks: Counter[tuple[str, str]]  # (column, what) -> captions
    damaged: list[str]  # a sentence for each file that was read in part, or not at all
    unread: bool  # whether a table could not be read, so that its captions may still exist
    sidecar_captions: pa.Table  # CAPTIONS from files next to images
    matches: Matches  # of tables' rows with the images `keys`
    keys: pa.Array  # of all images, the filtered ones too
    notes: list[str]  # a sentence for each source of which files elsewhere are read

    def with_former_names(self, former: pa.Table, content: pa.Table) -> "Scan":
        """The scan with the captions of rows that name images by their former names as well.

        `former` (key, source, content_hash) are files that were encoded, `content` (key,
        content_hash) the images as they are now.
        """
        rows = lookup(self.keys, content["key"])
        hashes = take_or_null(content["content_hash"].combine_chunks(), rows)
        by_former_names(self.matches, hashes, former)
        return self.with_rows()

    def with_rows(self) -> "Scan":
        """The scan with captions from sidecars and from the rows matched with the images."""
        tables = [self.sidecar_captions, captions_of(self.matches, self.keys, self.columns)]
        captions = pa.concat_tables(tables)
        mine = pc.is_in(captions["key"], value_set=self.images["key"])
        return replace(self, captions=filtered(captions, mine))


@dataclass
class _Collected:
    """What the sources gave so far."""

    tally: Tally = field(default_factory=Tally)
    images: list[pa.Table] = field(default_factory=list)
    captions: list[pa.Table] = field(default_factory=list)
    remarks: Counter[tuple[str, str]] = field(default_factory=Counter)


def scan(
    sources: tuple[str, ...],
    columns: tuple[str, ...] | None,
    only: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    workers: int = 8,
    image_suffixes: tuple[str, ...] = (),
    *,
    allow_outside: bool = False,
) -> Scan:
    """All images of the sources with their captions in `columns`, see captions.Column.

    None takes the column of AUTO that most images have. A file in two sources belongs to the first.
    `only` and `exclude` are patterns, or files of them, see filters.py; `image_suffixes` as of
    records.Search; `allow_outside` lets rows name files in any folder. A source that cannot be read
    is skipped and reported in Scan.damaged. Raises UserError for one that is missing, and where no
    image is found.
    """
    roots = named_roots(sources)
    parsed = tuple(map(Column.parse, AUTO if columns is None else columns))
    search = replace(image_search(parsed), image_suffixes=image_suffixes)
    urls = search.tables and columns is not None
    collected = _Collected()
    collected.tally.allowed = AllowedFolders.of_sources(
        list(roots.values()), allow_outside=allow_outside
    )
    for name, root in roots.items():
        stream = records_of(name, root, search, collected.tally)
        images = _take(stream, parsed, urls, collected, workers)
        if not images.num_rows and not is_table(root.name):
            collected.tally.damaged.append(_no_images(root))
    collected.tally.damaged += [text for it in collected.tally.outside if (text := it.refusal())]
    images = _each_once(
        pa.concat_tables([IMAGES.empty_table(), *collected.images]), collected.tally
    )
    if not images.num_rows:
        raise UserError(_nothing(sources, collected.tally))
    tally = collected.tally
    matches = match(tally.tables, images)
    for table in tally.tables:
        collected.remarks.update(table.rows.remarks)
    sidecars = pa.concat_tables([CAPTIONS.empty_table(), *collected.captions])
    kept = select_images(with_masks(images), only, exclude)
    keys = images["key"].combine_chunks()
    scanned = Scan(
        kept, sidecars, tuple(column.name for column in parsed), tuple(roots), tally.passed_over,
        collected.remarks, tally.damaged, bool(tally.unread), sidecars, matches, keys,
        tally.notes(),
    )  # fmt: skip
    scanned = scanned.with_rows()
    return scanned if columns is not None else _one_column(scanned)


def _one_column(found: Scan) -> Scan:
    """The scan with only the caption column that most images have, the first of several."""
    images = Counter(dict.fromkeys(AUTO, 0) | counts(found.captions["column"]))
    (column, _), *_ = images.most_common(1)
    mine = filtered(found.captions, pc.equal(found.captions["column"], column))
    sidecars = found.sidecar_captions
    sidecars = filtered(sidecars, pc.equal(sidecars["column"], column))
    remarks = Counter({what: n for what, n in found.remarks.items() if what[0] == column})
    return replace(
        found, captions=mine, columns=(column,), sidecar_captions=sidecars, remarks=remarks
    )


def _no_images(root: Path) -> str:
    return (
        f"no images in {root}: none of its files ends in {', '.join(sorted(IMAGE_SUFFIXES))}, and "
        f"no parquet or .arrow file there has any; give the folder or file with the images"
    )


def _nothing(sources: tuple[str, ...], tally: Tally) -> str:
    """Why there are no images."""
    if tally.damaged:
        more = len(tally.damaged) - 1
        return tally.damaged[0] + (f" (and {more} more like it)" if more else "")
    return (
        f"no images: the rows of {', '.join(sources)} name no image file that exists; add the "
        f"folder of the images to the sources"
    )


def image_search(columns: tuple[Column, ...]) -> Search:
    """A search for images, and the captions next to them."""
    rows = tuple(column for column in columns if column.suffix is None)
    suffixes = frozenset(column.suffix for column in columns if column.suffix)
    if rows:
        suffixes |= {"json"}  # where img2dataset notes the url, by which rows may name images
    return Search(is_image, suffixes, rows)


def named_roots(sources: tuple[str, ...]) -> dict[str, Path]:
    """Each source by its name, numbered where two have the same."""
    roots: dict[str, Path] = {}
    resolved = set()
    for source in sources:
        root = Path(source).expanduser().absolute()
        if not root.exists():
            raise UserError(f"{source}: no such file or directory")
        if not (root.is_dir() or root.name.endswith(ARCHIVE_SUFFIXES) or is_table(root.name)):
            suffixes = ", ".join([*ARCHIVE_SUFFIXES, *TABLE_SUFFIXES])
            raise UserError(
                f"{source} is no source of images; give a folder, or a file ending in {suffixes}"
            )
        if not (root.is_dir() or root.is_file()):
            raise UserError(f"{source} is a pipe, a socket or a device; give a file or a folder")
        if root.resolve() in resolved:
            raise UserError(f"{source} is given twice; give each source once")
        resolved.add(root.resolve())
        base = name = root.resolve().name or "root"
        number = 2
        while name in roots:
            name, number = f"{base}~{number}", number + 1
        roots[name] = root
    return roots


def records_of(name: str, root: Path, search: Search, tally: Tally) -> Iterator[Record]:
    """The records of one source."""
    if root.is_dir():
        return folder_records(name, root, search, tally)
    if is_table(root.name):
        table = given_table(name, root, search, tally)
        return iter(()) if table is None else row_records(table, tally)
    return archive_records(name, root, search, tally)


def _take(
    stream: Iterator[Record],
    columns: tuple[Column, ...],
    urls: bool,
    collected: _Collected,
    workers: int,
) -> pa.Table:
    """The images of one source; the captions next to them are added to `collected`."""
    tables = [IMAGES.empty_table()]
    read = partial(_read_block, columns=columns, urls=urls)
    with progress_bar(desc="scanning", unit="file", delay=2) as bar:  # seconds of silence
        for images, captions, remarks in map_blocks(read, stream, _BLOCK, workers):
            tables.append(images)
            collected.captions.append(captions)
            collected.remarks.update(remarks)
            bar.update(images.num_rows)
    # One chunk instead of thousands, which every later step would iterate over.
    collected.images.append(pa.concat_tables(tables).combine_chunks())
    collected.captions = [
        pa.concat_tables([CAPTIONS.empty_table(), *collected.captions]).combine_chunks()
    ]
    return collected.images[-1]


def _read_block(
    records: list[Record], columns: tuple[Column, ...], urls: bool
) -> tuple[pa.Table, pa.Table, Counter[tuple[str, str]]]:
    keys, names, texts, remarks = [], [], [], Counter[tuple[str, str]]()
    for record in records:
        captions, notes = read_captions(columns, record.sidecar)
        remarks.update(notes)
        for column, text in captions.items():
            keys.append(record.key)
            names.append(column)
            texts.append(text)
    key = pa.array([record.key for record in records], pa.string())
    stats = zip(*(record.stat for record in records), strict=True)
    images = [
        key,
        pa.array([record.source for record in records], pa.string()),
        *(pa.array(values, pa.int64()) for values in stats),
        pa.array(
            [url_of(record.sidecar("json")) if urls else None for record in records], pa.string()
        ),
        pa.array([record.reason for record in records], pa.string()),
        pa.array([record.detail for record in records], pa.string()),
    ]
    return (
        pa.Table.from_arrays(images, schema=IMAGES),
        pa.Table.from_arrays(
            [pa.array(v, pa.string()) for v in (keys, names, texts)], schema=CAPTIONS
        ),
        remarks,
    )


def _each_once(images: pa.Table, tally: Tally) -> pa.Table:
    """Sorted by key, with each key and each file once; the first source wins."""
    order = pa.array(np.arange(images.num_rows))
    for column in ("source", "key"):
        names = images[column].combine_chunks()
        first = pc.equal(pc.index_in(names, value_set=names), order.slice(0, images.num_rows))
        kept = images.filter(pc.or_(first, pc.equal(names, "")))
        if kept.num_rows < images.num_rows:
            tally.passed_over["named twice"] += images.num_rows - kept.num_rows
        images = kept
    return images.sort_by("key")
