"""Any number of sources -> one table of images and one of captions, sorted by key."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache import UserError
from xlsd_cache.blocks import in_blocks
from xlsd_cache.captions import Column, LeftOut, read_captions, read_object
from xlsd_cache.folders import walk
from xlsd_cache.lists import listed
from xlsd_cache.manifest import CAPTIONS, last_of
from xlsd_cache.match import SUFFIX, match
from xlsd_cache.records import (
    ARCHIVE_SUFFIXES,
    Record,
    Search,
    Tally,
    archive_records,
    folder_records,
    row_records,
)
from xlsd_cache.tables import JSONL_SUFFIXES, URLS, Rows, is_table, one, read_rows

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".mpo", ".pgm", ".png", ".ppm", ".qoi", ".tif", ".tiff", ".webp"}
)
# The store's own columns of a sample; any other column is a caption.
RESERVED = frozenset(
    ["key", "source", "bucket", "row", "width", "height", "crop", "content_hash", "crc32c"]
)
IMAGES = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("inode", pa.int64()),
        ("ctime_ns", pa.int64()),
        ("relative", pa.string()),  # the key without source name and suffix
        ("url", pa.string()),  # as img2dataset notes it beside the image; null where unknown
        ("reason", pa.string()),  # of decode.REASONS where the scan rejects it already, or empty
        ("detail", pa.string()),
    ]
)
_BLOCK = 256  # records a thread takes at once


@dataclass(frozen=True)
class Scan:
    """Everything found: one row an image, and what was passed over."""

    images: pa.Table  # IMAGES, sorted by key
    captions: pa.Table  # manifest.CAPTIONS, of these images
    names: tuple[str, ...]  # of the sources: what keys begin with
    passed_over: Counter[str]  # kind -> files that are neither images nor captions
    remarks: Counter[tuple[str, str]]  # (column, what) -> captions
    damaged: list[str]  # a sentence for each file that was read in part


@dataclass
class _Found:
    """What the sources gave so far."""

    tally: Tally = field(default_factory=Tally)
    images: list[pa.Table] = field(default_factory=list)
    captions: list[pa.Table] = field(default_factory=list)
    remarks: Counter[tuple[str, str]] = field(default_factory=Counter)


def scan(
    sources: tuple[str, ...],
    columns: tuple[str, ...],
    only: tuple[Path, ...] = (),
    exclude: tuple[Path, ...] = (),
    workers: int = 8,
) -> Scan:
    """All images of the sources with their captions in `columns`, see captions.Column.

    A file that two sources name counts for the first. `only` and `exclude` are lists of images, a
    line each. Raises UserError for a source that is missing, unreadable, or holds no image.
    """
    roots = named_roots(sources)
    parsed = tuple(map(Column.parse, columns))
    search = image_search(parsed)
    tables = {name: read_rows(root, parsed) for name, root in roots.items() if is_table(root.name)}
    found = _Found()
    for name, root in roots.items():
        tally = found.tally
        stream = records_of(name, root, tables.get(name), search, tally)
        images = _take(stream, parsed, search, found, workers)
        if not images.num_rows and name not in tables:
            raise UserError(
                f"no images in {root}: none of its files ends in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}; name what holds the images"
            )
        within = [read_rows(file, parsed) for file in tally.tables]
        for rows in [*within, *tables.values()]:
            found.captions.append(row_captions(rows, images))
        for rows in within:
            _remark(rows, found)
        tally.tables.clear()
    for rows in tables.values():
        _remark(rows, found)
    images = _each_once(pa.concat_tables([IMAGES.empty_table(), *found.images]), found.tally)
    if not images.num_rows:
        raise UserError(
            f"no images: the rows of {', '.join(sources)} name no image file that is there; name "
            f"the folder of the images as well"
        )
    images = listed(images, only, exclude)
    captions = pa.concat_tables([CAPTIONS.empty_table(), *found.captions])
    if search.tables:  # several may say something of one image
        captions = last_of(captions, ["key", "column"])
    captions = captions.filter(pc.is_in(captions["key"], value_set=one(images["key"])))
    told = found.tally.passed_over, found.remarks, found.tally.damaged
    return Scan(images, captions, tuple(roots), *told)


def image_search(columns: tuple[Column, ...]) -> Search:
    """Looks for images, and the captions beside them."""
    tables = any(column.suffix is None for column in columns)
    suffixes = frozenset(column.suffix for column in columns if column.suffix)
    if tables:
        suffixes |= {"json"}  # rows may name images by the url that img2dataset notes there
    return Search(is_image, suffixes, tables)


def is_image(name: str) -> bool:
    """Whether the name ends like an image's."""
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in IMAGE_SUFFIXES


def image_files(folder: Path) -> list[Path]:
    """All images of a folder and those in it, by name, in order."""
    found = walk(folder, Counter())
    return sorted(Path(inside, name) for inside, names in found for name in names if is_image(name))


def named_roots(sources: tuple[str, ...]) -> dict[str, Path]:
    """Each source under its own name, numbered where two share one."""
    roots: dict[str, Path] = {}
    resolved = set()
    for source in sources:
        root = Path(source).expanduser().absolute()
        if not root.exists():
            raise UserError(f"no folder or file {source}: nothing is there; name the images")
        if not (root.is_dir() or root.name.endswith(ARCHIVE_SUFFIXES) or is_table(root.name)):
            suffixes = ", ".join([*ARCHIVE_SUFFIXES, *JSONL_SUFFIXES, ".parquet"])
            raise UserError(
                f"{source} is no source of images; name a folder, or a file ending in {suffixes}"
            )
        if root.resolve() in resolved:
            raise UserError(f"{source} is named twice; name each source once")
        resolved.add(root.resolve())
        base = name = root.resolve().name or "root"
        number = 2
        while name in roots:
            name, number = f"{base}~{number}", number + 1
        roots[name] = root
    return roots


def records_of(
    name: str, root: Path, rows: Rows | None, search: Search, tally: Tally
) -> Iterator[Record]:
    """The records of one source; `rows` are its own where it is a table."""
    if rows is not None:
        return row_records(name, rows, tally)
    if root.is_dir():
        return folder_records(name, root, search, tally)
    return archive_records(name, root, search, tally)


def _take(
    stream: Iterator[Record],
    columns: tuple[Column, ...],
    search: Search,
    found: _Found,
    workers: int,
) -> pa.Table:
    """The images of one source; captions that lie beside them are added to `found`."""
    from tqdm import tqdm  # not with the command line, which may yet tell it how often to write

    tables = [IMAGES.empty_table()]
    read = partial(_read_block, columns=columns, urls=search.tables)
    with tqdm(desc="scanning", unit="file", delay=2) as bar:  # seconds of silence
        for images, captions, remarks in in_blocks(read, stream, _BLOCK, workers):
            tables.append(images)
            found.captions.append(captions)
            found.remarks.update(remarks)
            bar.update(images.num_rows)
    # One piece instead of thousands, which every later step would go through.
    found.images.append(pa.concat_tables(tables).combine_chunks())
    found.captions = [pa.concat_tables([CAPTIONS.empty_table(), *found.captions]).combine_chunks()]
    return found.images[-1]


def _read_block(
    records: list[Record], columns: tuple[Column, ...], urls: bool
) -> tuple[pa.Table, pa.Table, Counter[tuple[str, str]]]:
    keys, names, texts, remarks = [], [], [], Counter[tuple[str, str]]()
    for record in records:
        captions, said = read_captions(columns, record.beside)
        remarks.update(said)
        for column, text in captions.items():
            keys.append(record.key)
            names.append(column)
            texts.append(text)
    key = pa.array([record.key for record in records], pa.string())
    relative = pc.replace_substring_regex(
        pc.replace_substring_regex(key, "^[^/]*/", ""), SUFFIX, ""
    )
    stats = zip(*(record.stat for record in records), strict=True)
    images = [
        key,
        pa.array([record.source for record in records], pa.string()),
        *(pa.array(values, pa.int64()) for values in stats),
        relative,
        pa.array(
            [_url(record.beside("json")) if urls else None for record in records], pa.string()
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


def _url(data: bytes | LeftOut | None) -> str | None:
    """Where the image is from, as the .json beside it says."""
    value, _ = read_object(data)
    if not isinstance(value, dict):
        return None
    return next((url for name in URLS if isinstance(url := value.get(name), str)), None)


def read_urls(sources: list[str]) -> pa.Array:
    """Where images are from, by the .json beside those that are files of their own."""
    blocks = in_blocks(_read_urls, sources, _BLOCK, 8)
    return pa.array([url for block in blocks for url in block], pa.string())


def _read_urls(sources: list[str]) -> list[str | None]:
    found = []
    for source in sources:
        try:
            found.append(_url(Path(source).with_suffix(".json").read_bytes()))
        except (OSError, ValueError):
            found.append(None)
    return found


def row_captions(rows: Rows, images: pa.Table) -> pa.Table:
    """manifest.CAPTIONS that a table's rows give to these images."""
    at = match(rows, images) if rows.captions else np.empty(0, np.int64)
    tables = [CAPTIONS.empty_table()]
    for name, texts in rows.captions.items():
        found = texts.take(pa.array(at, mask=at < 0))
        keys, found = one(images["key"]).filter(pc.is_valid(found)), found.drop_null()
        tables.append(pa.table([keys, pa.repeat(name, len(keys)), found], schema=CAPTIONS))
    return pa.concat_tables(tables)


def _remark(rows: Rows, found: _Found) -> None:
    found.remarks.update(rows.remarks)
    if rows.damage:
        found.tally.damaged.append(f"{rows.file} is damaged: {rows.damage}; the rest is used")


def _each_once(images: pa.Table, tally: Tally) -> pa.Table:
    """Sorted by key, with neither a key nor a file twice; the first source named wins."""
    order = pa.array(np.arange(images.num_rows))
    for column in ("source", "key"):
        names = one(images[column])
        first = pc.equal(pc.index_in(names, value_set=names), order.slice(0, images.num_rows))
        kept = images.filter(pc.or_(first, pc.equal(names, "")))
        if kept.num_rows < images.num_rows:
            tally.passed_over["named twice"] += images.num_rows - kept.num_rows
        images = kept
    return images.sort_by("key")
