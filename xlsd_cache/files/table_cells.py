"""Columns of parquet and .arrow files, and the images in their cells."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xlsd_cache.files.captions import decode_text
from xlsd_cache.files.inflate import BadSource
from xlsd_cache.runtime.bounded_files import require_regular

Version = tuple[int, int, int, int]  # size, mtime, inode, ctime of the file
_TABLE_BYTES, _TIMES = 2**30, 32  # bytes, and times its own size, that columns may take
_ROWS = 65536  # read at once
_DECODED_BYTES = 2**28  # of texts in one piece, about: Arrow's hold 2 GiB
_HELD_BYTES = 2**29  # of decoded parquet row groups: rows of one group are read in any order


def table_schema(file: Path) -> pa.Schema:
    """The schema of a parquet or .arrow file. Raises OSError and ArrowException."""
    require_regular(file)
    schema = pq.read_schema(file) if _is_parquet(file) else _mapped(str(file)).schema
    len("".join(schema.names))  # UnicodeDecodeError, a ValueError, where one is not UTF-8
    return schema


def read_columns(file: Path, columns: list[str]) -> pa.Table:
    """Columns of the file, those named with dots pruned to that field of a struct.

    Raises OSError and ArrowException.
    """
    if _is_parquet(file):
        return _read_bounded(file, columns)
    table = _mapped(str(file)).select(list(dict.fromkeys(c.partition(".")[0] for c in columns)))
    table.validate(full=True)  # a file that lies must not crash who reads it
    return table


def _read_bounded(file: Path, columns: list[str]) -> pa.Table:
    """The columns, texts that are not UTF-8 read as Latin-1.

    Raises ArrowInvalid for what a few bytes were made to stand for, as a text named a billion
    times is.
    """
    nbytes = file.stat().st_size
    most, held = max(_TABLE_BYTES, _TIMES * nbytes), 0
    batches = []
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        if not opened.metadata.num_rows:
            return opened.read(columns=columns)
        schema, leaves = opened.schema_arrow, list(_leaves(opened, columns))
        rows, named = _rows_at_once(leaves), set[str]()
        if rows < _ROWS:  # so few at a time are slow
            named = {leaf.path_in_schema for leaf in leaves if leaf.path_in_schema in schema.names}
            named -= {leaf.path_in_schema for leaf in leaves if not _is_named(leaf)}
            rows = _rows_at_once([leaf for leaf in leaves if leaf.path_in_schema not in named])
    options = {"page_checksum_verification": True, "read_dictionary": sorted(named)}
    with pq.ParquetFile(file, **options) as opened:
        for batch in opened.iter_batches(rows, columns=columns):
            decoded = sum(_named_nbytes(batch[name]) for name in named)
            rest = (batch[it.name].nbytes for it in batch.schema if it.name not in named)
            held += decoded + sum(rest)
            if held > most:
                raise pa.ArrowInvalid(
                    f"its {nbytes} bytes hold more than {most >> 20} MiB of texts"
                )
            plain = [schema.field(it.name) if it.name in named else it for it in batch.schema]
            step = max(1, batch.num_rows // (1 + decoded // _DECODED_BYTES))
            pieces = (batch.slice(first, step) for first in range(0, batch.num_rows, step))
            batches += [_legible(piece.cast(pa.schema(plain))) for piece in pieces]
    return pa.Table.from_batches(batches)


def _rows_at_once(leaves: list[Any]) -> int:
    """Few enough that a page of one long text, named by each row, does not fill the memory."""
    most: int = max((leaf.total_uncompressed_size for leaf in leaves), default=1)
    return max(16, min(_ROWS, _TABLE_BYTES // max(1, most)))


def _leaves(file: pq.ParquetFile, columns: list[str]) -> Iterator[Any]:
    """What the file says of each of the columns, in each row group."""
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        for leaf in map(group.column, range(group.num_columns)):
            if any(f"{leaf.path_in_schema}.".startswith(f"{name}.") for name in columns):
                yield leaf


def _is_named(leaf: Any) -> bool:
    """Whether its texts can be read as what the rows name: no more than the file holds."""
    return leaf.physical_type == "BYTE_ARRAY" and "DELTA_BYTE_ARRAY" not in leaf.encodings


def _named_nbytes(texts: pa.DictionaryArray) -> int:
    """Bytes of the texts, each as often as a row names it."""
    return pc.sum(pc.binary_length(texts.dictionary).take(texts.indices)).as_py() or 0


def _legible(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with texts in UTF-8. Raises ArrowInvalid where one lies deeper and is not."""
    try:
        batch.validate(full=True)
        return batch
    except pa.ArrowInvalid:
        columns = []
        for column in batch.columns:
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                values = column.cast(pa.large_binary()).to_pylist()
                texts = [value and decode_text(value)[0] for value in values]
                column = pa.array([text or None for text in texts], column.type)  # noqa: PLW2901
            columns.append(column)
        batch = pa.RecordBatch.from_arrays(columns, schema=batch.schema)
        batch.validate(full=True)
        return batch


def cell_sizes(file: Path, column: str) -> Iterator[int | None]:
    """Bytes of each image in a column, a piece at a time; None where a row holds none."""
    for piece in _pieces(file, column):
        yield from pc.binary_length(piece).to_pylist()


def embedded(file: Path, column: str) -> pa.Array:
    """Which rows hold an image (bool), told by parquet's statistics where these do."""
    if not _is_parquet(file):
        return pa.concat_arrays([pa.array([], pa.bool_()), *_valid(_pieces(file, column))])
    parts = [pa.array([], pa.bool_())]
    with pq.ParquetFile(file) as opened:
        for number in range(opened.metadata.num_row_groups):
            group = opened.metadata.row_group(number)
            leaves = [group.column(i) for i in range(group.num_columns)]
            leaf = next((leaf for leaf in leaves if leaf.path_in_schema == column), None)
            told = leaf.statistics if leaf is not None else None
            nulls = told.null_count if told is not None and told.has_null_count else -1
            if nulls in (0, group.num_rows):
                parts.append(pa.repeat(nulls == 0, group.num_rows))
            else:
                piece = _binary(opened.read_row_group(number, columns=[column]), column)
                parts += _valid([piece])
    return pa.concat_arrays(parts)


def read_cell(path: str, column: str, row: int) -> bytes:
    """One value, whose whole piece of the file is decoded and kept for the next. Raises OSError."""
    require_regular(path)
    status = Path(path).stat()
    version = status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns
    try:
        starts = _starts(path, version)
        group = bisect_right(starts, row) - 1
        values = _held(path, version, column, group)
        value = values[row - starts[group]].as_py()
    except (pa.ArrowException, KeyError, IndexError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's; pyarrow's own have none
            raise
        raise BadSource("corrupt", f"cannot read {column} of row {row}: {error}") from error
    if not isinstance(value, bytes):
        raise BadSource("corrupt", f"{column} of row {row} holds no bytes")
    return value


def follow(table: pa.Table, field: str) -> tuple[pa.ChunkedArray, list[str]]:
    """The column that a dotted field leads to through structs, and what is left of its parts.

    A column named with its dots wins over a path.
    """
    if field in table.column_names:
        return table[field], []
    head, *rest = field.split(".")
    values = table[head]
    while rest and pa.types.is_struct(values.type) and values.type.get_field_index(rest[0]) >= 0:
        values = pc.struct_field(values, rest.pop(0))
    return values, rest


def _valid(pieces: Iterable[pa.ChunkedArray]) -> list[pa.Array]:
    return [chunk for piece in pieces for chunk in pc.is_valid(piece).chunks]


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _pieces(file: Path, column: str) -> Iterator[Any]:
    """The column as binary, a row group or record batch at a time."""
    if _is_parquet(file):
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            for group in range(table.metadata.num_row_groups):
                yield _binary(table.read_row_group(group, columns=[column]), column)
        return
    for batch in _mapped(str(file)).to_batches():
        yield _binary(pa.Table.from_batches([batch]), column)


def _binary(table: pa.Table, column: str) -> pa.ChunkedArray:
    """The column as one binary type; a view or a column of nothing becomes binary."""
    values, rest = follow(table, column)
    if rest:
        raise KeyError(column)
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        values = values.cast(pa.binary())
    values.validate(full=True)
    return values


_groups: OrderedDict[tuple[str, Version, str, int], Any] = OrderedDict()
_lock = Lock()


def _held(path: str, version: Version, column: str, group: int) -> Any:
    named = (path, version, column, group)
    with _lock:
        if named not in _groups:
            if _is_parquet(Path(path)):
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    table = file.read_row_group(group, columns=[column])
            else:
                table = pa.Table.from_batches([_mapped(path).to_batches()[group]])
            _groups[named] = _binary(table, column)
            while len(_groups) > 1 and sum(g.nbytes for g in _groups.values()) > _HELD_BYTES:
                _groups.popitem(last=False)
        _groups.move_to_end(named)
        return _groups[named]


@lru_cache(maxsize=4096)
def _starts(path: str, version: Version) -> list[int]:
    """The first row of each piece of that version of the file, and their end."""
    del version  # only tells the versions of a file apart
    if not _is_parquet(Path(path)):
        return [0, *accumulate(batch.num_rows for batch in _mapped(path).to_batches())]
    with pq.ParquetFile(path) as file:
        told = file.metadata
        return [0, *accumulate(told.row_group(i).num_rows for i in range(told.num_row_groups))]


def _mapped(path: str) -> pa.Table:
    """A whole .arrow file, nothing of it read yet: save_to_disk writes streams, Feather files."""
    with pa.memory_map(path) as file:
        try:
            return pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_stream(file).read_all()
