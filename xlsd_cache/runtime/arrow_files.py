"""Memory-maps Arrow files of unknown origin safely.

Arrow trusts the offsets in a file: wrong ones would read beyond the file's own memory.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from xlsd_cache.runtime.bounded_files import require_regular

_WHOLE = 2**28  # bytes; larger files have only their offsets validated, not their texts


def map_table(path: Path, wanted: pa.Schema, others: pa.DataType | None = None) -> pa.Table:
    """The memory-mapped table of a file of record batches, its offsets validated.

    Its first columns are `wanted`, without nulls unless nullable; any others have the type
    `others`. Raises OSError, ValueError and ArrowException for any other file.
    """
    require_regular(path)
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    fields = list(table.schema)
    own, rest = fields[: len(wanted)], fields[len(wanted) :]
    same = [(f.name, f.type) for f in own] == [(f.name, f.type) for f in wanted]
    if not same or any(field.type != others for field in rest):
        raise ValueError("it has other columns")
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError("two of its columns have one name")
    if any(table[field.name].null_count for field in wanted if not field.nullable):
        raise ValueError("some of its values are missing")
    table.validate(full=path.stat().st_size <= _WHOLE)
    for column in table.columns:
        for chunk in column.chunks:
            _check_offsets(chunk)
    return table


def _check_offsets(array: pa.Array) -> None:
    """Raise ValueError for offsets of texts or lists that decrease or leave their buffer."""
    kind, nested = array.type, None
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        nested, most = array.values, len(array.values)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        data = array.buffers()[2]
        most = data.size if data is not None else 0
    else:
        return
    wide = pa.types.is_large_list(kind) or pa.types.is_large_string(kind)
    offsets = array.buffers()[1]
    if len(array):
        ends = np.frombuffer(offsets, np.int64 if wide else np.int32)
        ends = ends[array.offset : array.offset + len(array) + 1]
        if len(ends) <= len(array) or ends[0] < 0 or ends[-1] > most or (np.diff(ends) < 0).any():
            raise ValueError("its offsets are beyond what it holds")
    if nested is not None:
        _check_offsets(nested)
