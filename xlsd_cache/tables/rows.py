"""Reads a table file of any format."""

import zlib
from pathlib import Path

import pyarrow as pa

from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column
from xlsd_cache.tables.arrow_tables import read_arrow_table
from xlsd_cache.tables.columns import EMBEDDING, Rows
from xlsd_cache.tables.text_tables import read_text_table

# What the libraries raise for a damaged file.
UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, MemoryError, RecursionError, zlib.error,
    pa.ArrowException,
)  # fmt: skip


def read_rows(file: Path, columns: tuple[Column, ...]) -> Rows:
    """All rows, with captions in the columns that this kind of file can have.

    A truncated or partly damaged file gives its intact rows, and Rows.damage. Raises UserError for
    a file that cannot be read at all.
    """
    arrow = file.name.lower().endswith(EMBEDDING)
    try:
        return (read_arrow_table if arrow else read_text_table)(file, columns)
    except UNREADABLE as error:
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot read {file}: {why}; repair it or leave it out") from error
