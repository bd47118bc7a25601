"""Arrow files mapped only once they cannot crash who reads them, or show what is not theirs.

Arrow believes a file's offsets: those that lie beyond its texts would be read as memory of others.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from xlsd_cache.runtime.bounded_files import require_regular

_WHOLE = 2**28  # bytes that are validated whole, texts too; of more the offsets alone


def map_table(path: Path, wanted: pa.Schema, others: pa.DataType | None = None) -> pa.Table:
    """The table in a file of record batches, mapped, its offsets within its buffers.

    It has the `wanted` columns first, whose values are all there, and further ones of the type
    `others`. Raises OSError, ValueError and ArrowException for a file that is anything else.
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
    """Raises ValueError where texts or lists are not one after the other within their buffer."""
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
        told = np.frombuffer(offsets, np.int64 if wide else np.int32)
        told = told[array.offset : array.offset + len(array) + 1]
        if len(told) <= len(array) or told[0] < 0 or told[-1] > most or (np.diff(told) < 0).any():
            raise ValueError("its offsets are beyond what it holds")
    if nested is not None:
        _check_offsets(nested)
