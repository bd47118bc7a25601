"""Reads columns of parquet and .arrow files, and the images in their cells."""

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
_TABLE_BYTES, _TIMES = 2**30, 32  # columns may take so many bytes, or times the file's size
_ROWS = 65536  # read at once
_DECODED_BYTES = 2**28  # of texts in one chunk, about: Arrow's limit is 2 GiB
_CACHE_BYTES = 2**29  # of decoded row groups: the rows of one group are read in any order


def table_schema(file: Path) -> pa.Schema:
    """The schema of a parquet or .arrow file. Raises OSError and ArrowException."""
    require_regular(file)
    schema = pq.read_schema(file) if _is_parquet(file) else _mapped(str(file)).schema
    len("".join(schema.names))  # raises UnicodeDecodeError, a ValueError, if one is not UTF-8
    return schema


def read_columns(file: Path, columns: list[str]) -> pa.Table:
    """Columns of the file; a dotted name reads only that field of a struct.

    Raises OSError and ArrowException.
    """
    if _is_parquet(file):
        return _read_bounded(file, columns)
    table = _mapped(str(file)).select(list(dict.fromkeys(c.partition(".")[0] for c in columns)))
    table.validate(full=True)  # a forged file must not crash its reader
    return table


def _read_bounded(file: Path, columns: list[str]) -> pa.Table:
    """The columns, with texts that are not UTF-8 decoded as Latin-1.

    Raises ArrowInvalid for a decompression bomb, e.g. a text that a dictionary repeats a billion
    times.
    """
    nbytes = file.stat().st_size
    most, held = max(_TABLE_BYTES, _TIMES * nbytes), 0
    batches = []
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        if not opened.metadata.num_rows:
            return opened.read(columns=columns)
        schema, leaves = opened.schema_arrow, list(_leaves(opened, columns))
        rows, named = _rows_at_once(leaves), set[str]()
        if rows < _ROWS:  # so few are slow: read repeated texts as dictionaries
            named = {leaf.path_in_schema for leaf in leaves if leaf.path_in_schema in schema.names}
            named -= {leaf.path_in_schema for leaf in leaves if not _can_be_dictionary(leaf)}
            rows = _rows_at_once([leaf for leaf in leaves if leaf.path_in_schema not in named])
    options = {"page_checksum_verification": True, "read_dictionary": sorted(named)}
    with pq.ParquetFile(file, **options) as opened:
        for batch in opened.iter_batches(rows, columns=columns):
            decoded = sum(_dictionary_nbytes(batch[name]) for name in named)
            rest = (batch[it.name].nbytes for it in batch.schema if it.name not in named)
            held += decoded + sum(rest)
            if held > most:
                raise pa.ArrowInvalid(
                    f"its {nbytes} bytes hold more than {most >> 20} MiB of texts"
                )
            plain = [schema.field(it.name) if it.name in named else it for it in batch.schema]
            step = max(1, batch.num_rows // (1 + decoded // _DECODED_BYTES))
            pieces = (batch.slice(first, step) for first in range(0, batch.num_rows, step))
            batches += [_as_utf8(piece.cast(pa.schema(plain))) for piece in pieces]
    return pa.Table.from_batches(batches)


def _rows_at_once(leaves: list[Any]) -> int:
    """Rows per batch, few enough that a long text repeated by every row fits into memory."""
    most: int = max((leaf.total_uncompressed_size for leaf in leaves), default=1)
    return max(16, min(_ROWS, _TABLE_BYTES // max(1, most)))


def _leaves(file: pq.ParquetFile, columns: list[str]) -> Iterator[Any]:
    """The metadata of each of the columns in each row group."""
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        for leaf in map(group.column, range(group.num_columns)):
            if any(f"{leaf.path_in_schema}.".startswith(f"{name}.") for name in columns):
                yield leaf


def _can_be_dictionary(leaf: Any) -> bool:
    """Whether its texts can be read as a dictionary, which takes no more than the file."""
    return leaf.physical_type == "BYTE_ARRAY" and "DELTA_BYTE_ARRAY" not in leaf.encodings


def _dictionary_nbytes(texts: pa.DictionaryArray) -> int:
    """Bytes of the texts when repeated for each row."""
    return pc.sum(pc.binary_length(texts.dictionary).take(texts.indices)).as_py() or 0


def _as_utf8(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Decode texts that are not UTF-8 as Latin-1. Raises ArrowInvalid for nested ones."""
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
    """The size in bytes of each image in a column; None for a row without one."""
    for piece in _pieces(file, column):
        yield from pc.binary_length(piece).to_pylist()


def rows_with_image(file: Path, column: str) -> pa.Array:
    """Whether each row has an image (bool), by parquet's statistics where possible."""
    if not _is_parquet(file):
        return pa.concat_arrays([pa.array([], pa.bool_()), *_valid(_pieces(file, column))])
    parts = [pa.array([], pa.bool_())]
    with pq.ParquetFile(file) as opened:
        for number in range(opened.metadata.num_row_groups):
            group = opened.metadata.row_group(number)
            leaves = [group.column(i) for i in range(group.num_columns)]
            leaf = next((leaf for leaf in leaves if leaf.path_in_schema == column), None)
            statistics = leaf.statistics if leaf is not None else None
            nulls = -1
            if statistics is not None and statistics.has_null_count:
                nulls = statistics.null_count
            if nulls in (0, group.num_rows):
                parts.append(pa.repeat(nulls == 0, group.num_rows))
            else:
                piece = _binary(opened.read_row_group(number, columns=[column]), column)
                parts += _valid([piece])
    return pa.concat_arrays(parts)


def read_cell(path: str, column: str, row: int) -> bytes:
    """One cell's bytes. Its row group or batch is decoded and cached. Raises OSError."""
    require_regular(path)
    status = Path(path).stat()
    version = status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns
    try:
        starts = _starts(path, version)
        group = bisect_right(starts, row) - 1
        values = _cached_group(path, version, column, group)
        value = values[row - starts[group]].as_py()
    except (pa.ArrowException, KeyError, IndexError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's; pyarrow's have no errno
            raise
        raise BadSource("corrupt", f"cannot read {column} of row {row}: {error}") from error
    if not isinstance(value, bytes):
        raise BadSource("corrupt", f"{column} of row {row} holds no bytes")
    return value


def resolve_field(table: pa.Table, field: str) -> tuple[pa.ChunkedArray, list[str]]:
    """The column at a dotted path through structs, and the parts of the path beyond it.

    A column of the whole dotted name takes precedence.
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
    """The column as binary, by row group or record batch."""
    if _is_parquet(file):
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            for group in range(table.metadata.num_row_groups):
                yield _binary(table.read_row_group(group, columns=[column]), column)
        return
    for batch in _mapped(str(file)).to_batches():
        yield _binary(pa.Table.from_batches([batch]), column)


def _binary(table: pa.Table, column: str) -> pa.ChunkedArray:
    """The column as binary or large binary; views and null columns are cast."""
    values, rest = resolve_field(table, column)
    if rest:
        raise KeyError(column)
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        values = values.cast(pa.binary())
    values.validate(full=True)
    return values


_groups: OrderedDict[tuple[str, Version, str, int], Any] = OrderedDict()
_lock = Lock()


def _cached_group(path: str, version: Version, column: str, group: int) -> Any:
    named = (path, version, column, group)
    with _lock:
        if named not in _groups:
            if _is_parquet(Path(path)):
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    table = file.read_row_group(group, columns=[column])
            else:
                table = pa.Table.from_batches([_mapped(path).to_batches()[group]])
            _groups[named] = _binary(table, column)
            while len(_groups) > 1 and sum(g.nbytes for g in _groups.values()) > _CACHE_BYTES:
                _groups.popitem(last=False)
        _groups.move_to_end(named)
        return _groups[named]


@lru_cache(maxsize=4096)
def _starts(path: str, version: Version) -> list[int]:
    """The first row of each row group or batch, and the number of rows."""
    del version  # a key of the cache
    if not _is_parquet(Path(path)):
        return [0, *accumulate(batch.num_rows for batch in _mapped(path).to_batches())]
    with pq.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        return [0, *accumulate(file.metadata.row_group(i).num_rows for i in groups)]


def _mapped(path: str) -> pa.Table:
    """A memory-mapped .arrow file: a stream, as save_to_disk writes, or a file, as Feather."""
    with pa.memory_map(path) as file:
        try:
            return pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_stream(file).read_all()
