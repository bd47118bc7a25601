"""Reads the parquet files of the log, many small ones from one *fold*.

Each file takes about a millisecond to open, however little it holds, and a store that is updated
for months has thousands. A fold, `manifest/folded/KIND.parquet`, holds the lines of the small files
of one kind. It is derived and may be deleted at any time. It stands for a file only while that file
has the size, mtime and inode that it had when it was folded, so no file of the log is ever changed
or deleted for it.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xlsd_cache.errors import UserError, one_line
from xlsd_cache.runtime.atomic import is_whole, write_parquet
from xlsd_cache.runtime.bounded_files import parse_json, require_regular
from xlsd_cache.schema import CAPTIONS, COMMIT, LATER, MOST_ROWS, PLAN
from xlsd_cache.vocabulary import Bucket

SMALL = 1 << 16  # bytes: larger files take longer to decode than to open
TOGETHER = 8  # new small files that are folded at once
_FIELDS = {field.name: field for table in (PLAN, COMMIT, CAPTIONS) for field in table}
_NEEDED = frozenset("key bucket row status column text".split())
_FILES = "xlsd.files"  # a fold's metadata: JSON [[name, size, mtime_ns, inode, lines], ...]

Read = Callable[[Path, Sequence[str]], pa.Table]  # these columns of one file of the log
Signature = tuple[int, ...]  # size, mtime_ns, inode; empty where there is no file


class _Place(NamedTuple):
    """Where a fold has the lines of a file."""

    file: Signature  # as it was when it was folded
    start: int
    stop: int


_NOWHERE = _Place((), 0, 0)


def read_log(path: Path, columns: Sequence[str], *, folded: bool = False) -> pa.Table:
    """Columns of one of the log's tables. Raises UserError where it is unreadable or invalid.

    A fold may lack values, where it has a key that was removed.
    """
    with readable(path):
        require_regular(path)
        file = pq.ParquetFile(path)
        present = set(file.schema_arrow.names)
        table = file.read([name for name in columns if name in present])
        for name in LATER.intersection(columns) - present:
            table = table.append_column(PLAN.field(name), pa.nulls(table.num_rows, pa.int64()))
        table = table.select(list(columns))
        table = table.cast(pa.schema([_FIELDS[name] for name in columns]))
        _check(table, frozenset() if folded else _NEEDED)
    return table


def _check(table: pa.Table, needed: frozenset[str]) -> None:
    """Raise ValueError for bucket names and rows that no store has."""
    table.validate(full=True)
    for column in needed.intersection(table.column_names):
        if table[column].null_count:
            raise ValueError(f"its {column} is missing in some rows")
    if "bucket" in table.column_names:
        for name in pc.unique(table["bucket"]).to_pylist():
            if name:
                Bucket.parse(name)
    if "row" in table.column_names and table.num_rows:
        ends = pc.min_max(table["row"]).as_py()
        if not -1 <= (ends["min"] or 0) <= (ends["max"] or 0) < MOST_ROWS:
            raise ValueError(f"its rows are from {ends['min']} to {ends['max']}")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise UserError for anything that reading a file of the log raises."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        store = path.parents[1 if path.parent.name == "captions" else 2]
        raise UserError(
            f"cannot read {path}, a part of the store's log: {one_line(error)}; "
            f"`xlsd-cache check {store} --repair` repairs what can be repaired"
        ) from error


def read_together(
    root: Path, kind: str, names: Sequence[str], columns: Sequence[str], read: Read
) -> Iterator[pa.Table]:
    """The lines of these files in order, from the fold where it has them, else by `read`."""
    places, lines = _folded(root, kind, names, columns)
    pieces: list[str | list[int]] = []  # lines that follow one another are one piece
    for name, place in zip(names, places, strict=True):
        last = pieces[-1] if pieces else None
        if place is None:
            pieces.append(name)
        elif isinstance(last, list) and last[1] == place.start:
            last[1] = place.stop
        else:
            pieces.append([place.start, place.stop])
    for piece in pieces:
        if isinstance(piece, str):
            yield read(root / piece, columns)
        else:
            yield lines.slice(piece[0], piece[1] - piece[0])


def write_fold(
    root: Path, kind: str, names: Sequence[str], columns: Sequence[str], read: Read
) -> None:
    """Fold these files, once TOGETHER small ones have come or changed since the last time.

    Reading the log takes longer than this at any size. Does nothing where the log is unreadable,
    which its readers report, or the disk is full.
    """
    fold = _fold(root, kind)
    signatures = {name: _signature(f"{root}/{name}") for name in names}
    small = [name for name, it in signatures.items() if it and it[0] <= SMALL]
    known = _places(fold, _signature(fold))
    new = [name for name in small if known.get(name, _NOWHERE).file != signatures[name]]
    if len(new) < TOGETHER:
        return
    counts = {name: place.stop - place.start for name, place in known.items()}

    def counted(path: Path, columns: Sequence[str]) -> pa.Table:
        table = read(path, columns)
        counts[path.relative_to(root).as_posix()] = table.num_rows
        return table

    with suppress(OSError, UserError):
        lines = pa.concat_tables(read_together(root, kind, small, columns, counted))
        files = [[name, *signatures[name], counts[name]] for name in small]
        fold.parent.mkdir(exist_ok=True)
        metadata = {_FILES: json.dumps(files)}
        write_parquet(fold, lines.replace_schema_metadata(metadata), root / "staging")


def _folded(
    root: Path, kind: str, names: Sequence[str], columns: Sequence[str]
) -> tuple[list[_Place | None], pa.Table]:
    """Each file's place in the fold, None where it does not stand for it; its lines' columns."""
    fold = _fold(root, kind)
    before = _signature(fold)
    known = _places(fold, before)
    found = ((name, known.get(name)) for name in names) if known else ()
    places = [it if it and it.file == _signature(f"{root}/{name}") else None for name, it in found]
    if any(places):
        with suppress(UserError):
            lines = read_log(fold, columns, folded=True)
            if _signature(fold) == before:  # else it has been replaced meanwhile
                return places, lines
    return [None] * len(names), None


def _places(fold: Path, signature: Signature) -> dict[str, _Place]:
    """Where the fold has the lines of each file, by name; empty where it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return _read_places(fold, signature) if signature else {}
    return {}


@lru_cache(maxsize=4)  # one a kind: reading a million lines' checksum once is enough
def _read_places(fold: Path, _: Signature) -> dict[str, _Place]:
    if not is_whole(fold):
        raise ValueError("its checksum is wrong")
    metadata, places, start = pq.read_metadata(fold), dict[str, _Place](), 0
    for name, *file, lines in parse_json(metadata.metadata[_FILES.encode()]):
        if type(lines) is not int or lines < 0:
            raise ValueError("its files are not its lines")
        places[name] = _Place(tuple(file), start, start + lines)
        start += lines
    if start != metadata.num_rows:
        raise ValueError("its files are not its lines")
    return places


def _fold(root: Path, kind: str) -> Path:
    return root / "manifest" / "folded" / f"{kind}.parquet"


def _signature(path: str | Path) -> Signature:
    """Size, mtime and inode; empty where there is no file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - faster than a Path
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino
