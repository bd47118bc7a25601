"""Reads image headers, and the content hashes of files that may be equal, for planning.

Results are journaled in staging, so that a planning that was killed resumes where it was.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.files.inflate import BadSource
from xlsd_cache.files.uri import open_source, read_source
from xlsd_cache.images.header import (
    MAX_PIXELS,
    MOST_PIXELS,
    PARSED_IN_C,
    header_of,
    max_bytes,
    read_header,
)
from xlsd_cache.images.sandbox import decoders
from xlsd_cache.outcomes import LIMITED, RETRIED, Rejected
from xlsd_cache.runtime.arrow import Ints, lookup, merge_rows, take_or_null
from xlsd_cache.runtime.bounded_files import parse_json
from xlsd_cache.runtime.own_files import MARK, is_marked
from xlsd_cache.runtime.threads import map_blocks

HEADERS = pa.schema(
    [
        ("width", pa.int32()),  # of the upright image; 0 where it could not be read
        ("height", pa.int32()),
        ("reason", pa.string()),  # empty, or an outcomes.Reason
        ("detail", pa.string()),
        ("head", pa.string()),  # hash of the file's first bytes: where it differs, files differ
    ]
)
_STAT = ["size", "mtime_ns", "inode", "ctime_ns"]  # as in uri.Stat
_IDENTITY = [pa.field("key", pa.string()), *(pa.field(name, pa.int64()) for name in _STAT)]
FILES = ["key", "source", *_STAT]  # the columns of files to read
HASHES = pa.schema([("content_hash", pa.string())])  # sha256; empty where it cannot be read
_HEAD_BYTES = 16384  # a disk reads as much for the header anyway
_BLOCK = 64  # files a thread takes at once
_LINES = 1 << 16  # of a journal that are Python objects at a time

File = tuple[str, int]  # source, bytes
Row = tuple[Any, ...]


def read_headers(
    files: pa.Table, journal: Path | None, workers: int, max_pixels: int = MAX_PIXELS
) -> pa.Table:
    """HEADERS of `files` (FILES), aligned with it.

    Sizes are given whatever they are; `max_pixels` only limits the memory that parsing may take.
    """
    # A passing fault, and a verdict that depends on a limit, must not be found in the journal.
    results = _Journal(journal, HEADERS, keep=lambda row: row[2] not in RETRIED | LIMITED)
    return _read(files, partial(_header, workers, max_pixels), results, workers, "reading headers")


def read_hashes(
    files: pa.Table, journal: Path | None, workers: int, doing: str = "finding duplicates"
) -> pa.Array:
    """sha256 of `files` (FILES), aligned; empty where one cannot be read: encoding will say why."""
    results = _Journal(journal, HASHES, keep=lambda row: bool(row[0]))
    return _read(files, _hash, results, workers, doing)["content_hash"].combine_chunks()


def _header(workers: int, max_pixels: int, file: File) -> Row:
    source, nbytes = file
    head, why = "", Rejected("bad_name", "its name is not UTF-8; rename it")
    try:
        most = max_bytes(max_pixels)
        if nbytes > most:
            why = Rejected("too_many_bytes", f"{nbytes} bytes are more than {most}")
        elif source:
            with open_source(source, most) as opened:
                first = opened.read(_HEAD_BYTES)
                head = hashlib.blake2b(first, digest_size=8).hexdigest()
                if PARSED_IN_C.match(first):
                    first += opened.read(most)
                    size = decoders(workers, max_pixels).call(header_of, first, MOST_PIXELS)
                else:
                    opened.seek(0)
                    size = read_header(opened, nbytes, MOST_PIXELS)
                if MARK.encode() in first and not isinstance(size, Rejected):
                    opened.seek(0)
                    if is_marked(opened):
                        size = Rejected("made_here", "one of these programs drew it")
            if not isinstance(size, Rejected):
                return *size, "", "", head
            why = size
    except FileNotFoundError:
        why = Rejected("vanished", "gone between the scan and its reading")
    except BadSource as error:
        why = Rejected(error.reason, str(error))
    except OSError as error:
        why = Rejected("unreadable", error.strerror or str(error))
    return 0, 0, why.reason, why.detail.encode("utf-8", "backslashreplace").decode(), head


def _hash(file: File) -> Row:
    try:
        return (hashlib.sha256(read_source(file[0])).hexdigest(),)
    except OSError:
        return ("",)


def _read(
    files: pa.Table, function: Callable[[File], Row], journal: "_Journal", workers: int, title: str
) -> pa.Table:
    """`function` of each file as a table; files that the journal has are not read again."""
    journaled, rows = journal.read(files)
    todo = np.flatnonzero(rows < 0)
    tables: list[pa.Table] = [journaled.take(pa.array(rows[rows >= 0]))]
    done, few = len(rows) - len(todo), len(todo) < 99
    with progress_bar(desc=title, total=len(rows), initial=done, unit="file", disable=few) as bar:
        parts = (todo[i : i + 4096] for i in range(0, len(todo), 4096))
        stream = (file for part in parts for file in _listed(files, part))
        # The journal is written block by block: a kill loses only what the threads hold.
        for block in map_blocks(partial(_each, function), stream, _BLOCK, workers):
            tables.append(_table([result for _, result in block], journal.schema))
            journal.append(block)
            bar.update(len(block))
    order = np.concatenate([np.flatnonzero(rows >= 0), todo])
    return merge_rows([pa.concat_tables(tables)], [order])


def _listed(files: pa.Table, rows: Ints) -> list[Row]:
    part = files.select(FILES).take(pa.array(rows))
    return list(zip(*(column.to_pylist() for column in part.columns), strict=True))


def _each(function: Callable[[File], Row], block: list[Row]) -> list[tuple[Row, Row]]:
    """((key, size, mtime_ns, inode, ctime_ns), result) of each."""
    return [((key, size, *times), function((source, size))) for key, source, size, *times in block]


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


@dataclass(frozen=True)
class _Journal:
    """A file of JSON lines: key and stat of a file, then what was read of it."""

    path: Path | None  # None: nothing is kept
    schema: pa.Schema  # of the results
    keep: Callable[[Row], bool]  # whether a result may be used by a later planning

    def append(self, block: list[tuple[Row, Row]]) -> None:
        """Write the results that may be kept."""
        if self.path is None:
            return
        kept = [(*file, *result) for file, result in block if self.keep(result)]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept))

    def read(self, files: pa.Table) -> tuple[pa.Table, Ints]:
        """The results, and the row of each file's, or -1; another program's file is deleted."""
        nothing = _table([], self.schema), np.full(files.num_rows, -1)
        if self.path is None or not self.path.exists():
            return nothing
        try:
            schema = pa.schema([*_IDENTITY, *self.schema])
            table = pa.concat_tables([_table(rows, schema) for rows in self._lines(self.path)])
        except (ValueError, TypeError, pa.ArrowException):  # or of another version
            self.path.unlink()
            return nothing
        rows = lookup(files["key"], table["key"])
        journaled = take_or_null(table, rows)
        for name in _STAT:
            same = pc.fill_null(pc.equal(journaled[name], files[name]), False)
            rows = np.where(same, rows, -1)
        return table.select(self.schema.names), rows

    @staticmethod
    def _lines(path: Path) -> Iterator[list[Row]]:
        """Lists of the lines up to the first damaged one, from which the file is cut off."""
        lines: list[Row] = []
        nbytes = 0
        with path.open("r+b") as file:
            for line in file:
                try:
                    lines.append(tuple(parse_json(line)))
                except (ValueError, TypeError):
                    break
                nbytes += len(line)
                if len(lines) == _LINES:
                    yield lines
                    lines = []
            file.truncate(nbytes)  # what is appended next must start a line
        yield lines
