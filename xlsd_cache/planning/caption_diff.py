"""What the captions found say that the log does not."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.schema import CAPTIONS
from xlsd_cache.tables.columns import one
from xlsd_cache.tables.names import look_up

_SLICE = 1 << 20  # captions: their texts must stay below the 2 GiB of one Arrow array


def caption_changes(
    keys: pa.Array, new: pa.Table, columns: tuple[str, ...], known: pa.Table
) -> pa.Table:
    """Captions of these images that differ from the log's, an empty text where one is gone."""
    tables = [CAPTIONS.empty_table()]
    for column in columns:
        said = [_texts(table, column, keys) for table in (new, known)]
        for start in range(0, len(keys), _SLICE):
            mine = keys.slice(start, _SLICE)
            text, old = (
                pc.fill_null(texts.take(pa.array(at, mask=at < 0)), "")
                for texts, at in ((texts, at[start : start + _SLICE]) for texts, at in said)
            )
            differ = pc.not_equal(text, old)
            changed, text = mine.filter(differ), pc.cast(text.filter(differ), pa.string())
            named = pa.repeat(column, len(changed))
            tables.append(pa.table([changed, named, text], schema=CAPTIONS))
    return pa.concat_tables(tables)


def _texts(captions: pa.Table, column: str, keys: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """A column's texts, and which is each key's, or -1. They may be more than 2 GiB."""
    mine = captions.filter(pc.equal(captions["column"], column))
    texts = pc.cast(mine["text"], pa.large_string())
    return one(texts), look_up(keys, one(mine["key"]))
