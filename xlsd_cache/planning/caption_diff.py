"""Captions that differ between the scan and the log: what the next generation writes."""

import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.runtime.arrow import Ints, filtered, lookup, take_or_null
from xlsd_cache.schema import CAPTIONS

_SLICE = 1 << 20  # captions: their texts must stay below the 2 GiB of one Arrow array


def caption_changes(
    keys: pa.Array, new: pa.Table, columns: tuple[str, ...], logged: pa.Table
) -> pa.Table:
    """CAPTIONS of the images `keys` that differ from the log's; an empty text where one is gone."""
    changes = [CAPTIONS.empty_table()]
    for column in columns:
        new_texts, new_rows = _texts(new, column, keys)
        old_texts, old_rows = _texts(logged, column, keys)
        for start in range(0, len(keys), _SLICE):
            part = slice(start, start + _SLICE)
            text = pc.fill_null(take_or_null(new_texts, new_rows[part]), "")
            old = pc.fill_null(take_or_null(old_texts, old_rows[part]), "")
            differs = pc.not_equal(text, old)
            changed = keys[part].filter(differs)
            text = pc.cast(text.filter(differs), pa.string())
            table = [changed, pa.repeat(column, len(changed)), text]
            changes.append(pa.table(table, schema=CAPTIONS))
    return pa.concat_tables(changes)


def _texts(captions: pa.Table, column: str, keys: pa.Array) -> tuple[pa.Array, Ints]:
    """A column's texts, which may pass 2 GiB, and the position of each key's text, or -1."""
    captions = filtered(captions, pc.equal(captions["column"], column))
    texts = pc.cast(captions["text"], pa.large_string())
    return texts.combine_chunks(), lookup(keys, captions["key"])
