"""What planning must read of files: their headers, and where two may be equal their content.

Both go through a journal in staging: a planning that was killed goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from xlsd_cache.files.inflate import BadSource
from xlsd_cache.files.uri import open_source, read_source
from xlsd_cache.images.decode import (
    MAX_PIXELS,
    MOST_PIXELS,
    PARSED_IN_C,
    header_of,
    max_bytes,
    read_header,
)
from xlsd_cache.images.sandbox import decoders
from xlsd_cache.outcomes import LIMITED, RETRIED, Rejected
from xlsd_cache.runtime.arrow import lookup, take_or_null
from xlsd_cache.runtime.bounded_files import parse_json
from xlsd_cache.runtime.own_files import MARK, is_marked
from xlsd_cache.runtime.threads import in_blocks

HEADERS = pa.schema(
    [
        ("width", pa.int32()),  # of the upright image; 0 where it could not be read
        ("height", pa.int32()),
        ("reason", pa.string()),  # empty, or why not
        ("detail", pa.string()),
        ("head", pa.string()),  # of the file's first bytes: files that differ here need no hash
    ]
)
_TIMES = ["size", "mtime_ns", "inode", "ctime_ns"]  # as in locate.Stat
_NAMES = [pa.field("key", pa.string()), *(pa.field(name, pa.int64()) for name in _TIMES)]
FILES = ["key", "source", *_TIMES]  # the columns of files to read
HASHES = pa.schema([("content_hash", pa.string())])  # sha256; empty where it cannot be read
_HEAD_BYTES = 16384  # what reading the header fetches from the disk anyway
_BLOCK = 64  # files a thread takes at once

File = tuple[str, int]  # source, bytes
Row = tuple[Any, ...]


def read_headers(
    files: pa.Table, journal: Path | None, workers: int, max_pixels: int = MAX_PIXELS
) -> pa.Table:
    """HEADERS of `files` (FILES), aligned with it.

    Sizes are told whatever they are; `max_pixels` only limits the memory of what parses headers.
    """
    header = partial(_header, workers, max_pixels)
    return _read(files, HEADERS, header, journal, workers, "reading headers")


def read_hashes(
    files: pa.Table, journal: Path | None, workers: int, doing: str = "finding duplicates"
) -> pa.Array:
    """sha256 of `files`, aligned; empty where one cannot be read, which its encoding will say."""
    return _read(files, HASHES, _hash, journal, workers, doing)["content_hash"].combine_chunks()


def _header(workers: int, max_pixels: int, file: File) -> Row:
    source, nbytes = file
    head, size = "", Rejected("bad_name", "its name is not UTF-8; rename it")
    try:
        most = max_bytes(max_pixels)
        if nbytes > most:
            size = Rejected("too_many_bytes", f"{nbytes} bytes are more than {most}")
        elif source:
            with open_source(source, most) as opened:
                first = opened.read(_HEAD_BYTES)
                head = hashlib.blake2b(first, digest_size=8).hexdigest()
                if PARSED_IN_C.match(first):
                    first += opened.read(most)
                    found = decoders(workers, max_pixels).call(header_of, first, MOST_PIXELS)
                else:
                    opened.seek(0)
                    found = read_header(opened, nbytes, MOST_PIXELS)
                if MARK.encode() in first and not isinstance(found, Rejected):
                    opened.seek(0)
                    if is_marked(opened):
                        found = Rejected("made_here", "one of these programs drew it")
            if not isinstance(found, Rejected):
                return *found, "", "", head
            size = found
    except FileNotFoundError:
        size = Rejected("vanished", "gone between the scan and its reading")
    except BadSource as error:
        size = Rejected(error.reason, str(error))
    except OSError as error:
        size = Rejected("unreadable", error.strerror or str(error))
    return 0, 0, size.reason, size.detail.encode("utf-8", "backslashreplace").decode(), head


def _hash(file: File) -> Row:
    try:
        return (hashlib.sha256(read_source(file[0])).hexdigest(),)
    except OSError:
        return ("",)


def _read(
    files: pa.Table,
    schema: pa.Schema,
    function: Callable[[File], Row],
    journal: Path | None,
    workers: int,
    doing: str,
) -> pa.Table:
    """`function` of each file as a table, what the journal already holds left out of the work."""
    past, at = _resume(files, schema, journal)
    todo = np.flatnonzero(at < 0)
    rows: list[pa.Table] = [past.take(pa.array(at[at >= 0]))]
    bar = tqdm(
        desc=doing, total=len(at), initial=len(at) - len(todo), unit="file", disable=len(todo) < 99
    )
    with bar:
        stream = (todo[i : i + 4096] for i in range(0, len(todo), 4096))
        wanted = (row for part in stream for row in _listed(files, part))
        # A line a file, a write a block: at a kill only what the threads hold is read again.
        for block in in_blocks(partial(_each, function), wanted, _BLOCK, workers):
            rows.append(_table([found for _, found in block], schema))
            _append(journal, block)
            bar.update(len(block))
    order = np.empty(len(at), np.int64)
    order[np.concatenate([np.flatnonzero(at >= 0), todo])] = np.arange(len(at))
    return pa.concat_tables(rows).combine_chunks().take(pa.array(order))


def _listed(files: pa.Table, at: NDArray[np.int64]) -> list[Row]:
    part = files.select(FILES).take(pa.array(at))
    return list(zip(*(column.to_pylist() for column in part.columns), strict=True))


def _each(function: Callable[[File], Row], block: list[Row]) -> list[tuple[Row, Row]]:
    """((key, size, mtime_ns, inode, ctime_ns), result) of each."""
    return [((key, size, *times), function((source, size))) for key, source, size, *times in block]


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _append(journal: Path | None, block: list[tuple[Row, Row]]) -> None:
    if journal is None:
        return
    # What was the moment's fault or a limit's, and a hash that could not be had, is not to be
    # believed later.
    doubted = RETRIED | LIMITED
    kept = [
        (*named, *row) for named, row in block if not doubted.intersection(row) and row[0] != ""
    ]
    with journal.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in kept))


def _resume(
    files: pa.Table, schema: pa.Schema, journal: Path | None
) -> tuple[pa.Table, NDArray[np.int64]]:
    """The journal's results, and which of them is each file's, or -1."""
    nothing = _table([], schema), np.full(files.num_rows, -1)
    if journal is None or not journal.exists():
        return nothing
    lines: list[Row] = []
    whole = 0
    with journal.open("r+b") as file:
        for line in file:
            try:
                lines.append(tuple(parse_json(line)))
            except (ValueError, TypeError):
                break
            whole += len(line)
        file.truncate(whole)  # a torn line would spoil the next
    try:
        journaled = _table(lines, pa.schema([*_NAMES, *schema]))
    except (ValueError, TypeError, pa.ArrowException):  # not ours, or of another version
        journal.unlink()
        return nothing
    at = lookup(files["key"], journaled["key"])
    there = take_or_null(journaled, at)
    for name in _TIMES:
        same = pc.fill_null(pc.equal(there[name], files[name]), False)
        at = np.where(same, at, -1)
    return journaled.select(schema.names), at
