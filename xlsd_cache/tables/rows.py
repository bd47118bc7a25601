"""One table file of any format -> its rows."""

import zlib
from pathlib import Path

import pyarrow as pa

from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column
from xlsd_cache.tables.arrow_tables import read_arrow_table
from xlsd_cache.tables.columns import EMBEDDING, Rows
from xlsd_cache.tables.text_tables import read_text_table

# What the libraries raise of a file that is not what it says; UserError is none of them.
UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, MemoryError, RecursionError, zlib.error,
    pa.ArrowException,
)  # fmt: skip


def read_rows(file: Path, columns: tuple[Column, ...]) -> Rows:
    """All rows with their captions in the columns that this kind of file can hold.

    Raises UserError for a file that is nothing of the sort; one that is cut short or damaged in
    places gives what is whole, and says what is not.
    """
    arrow = file.name.lower().endswith(EMBEDDING)
    try:
        return (read_arrow_table if arrow else read_text_table)(file, columns)
    except UNREADABLE as error:
        told = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot read {file}: {told}; mend it or leave it out") from error
