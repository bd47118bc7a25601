"""Joins of Arrow tables and columns: where equal values are, and the last row of each key."""

from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Column: TypeAlias = Any  # pa.Array | pa.ChunkedArray
_WANTED, _HAVE = "__wanted", "__have"  # columns of row numbers


def lookup(wanted: Column, have: Column) -> Ints:
    """int64 [wanted]: position in `have` of the last equal value, or -1; null equals nothing."""
    if have.null_count == len(have) or wanted.null_count == len(wanted):
        return np.full(len(wanted), -1)
    backwards = have.take(pa.array(np.arange(len(have))[::-1]))
    found = pc.index_in(wanted, value_set=backwards, skip_nulls=True)
    positions: Ints = pc.fill_null(found, len(have)).to_numpy().astype(np.int64)
    return len(have) - 1 - positions


def lookup_rows(wanted: pa.Table, have: pa.Table, keys: list[str]) -> Ints:
    """int64 [wanted]: first row of `have` with equal `keys`, or -1; null equals nothing."""
    left, right = _numbered(wanted, keys, _WANTED), _numbered(have, keys, _HAVE)
    pairs = left.join(right, keys, join_type="inner", use_threads=False)
    rows = np.full(wanted.num_rows, have.num_rows)
    np.minimum.at(rows, pairs[_WANTED].to_numpy(), pairs[_HAVE].to_numpy())
    return np.where(rows < have.num_rows, rows, -1)


def last_per_key(table: pa.Table, keys: list[str]) -> Ints:
    """int64, ascending: the last row of each distinct value of `keys`."""
    groups = _numbered(table, keys, _HAVE).group_by(keys, use_threads=False)
    return np.sort(groups.aggregate([(_HAVE, "max")])[f"{_HAVE}_max"].to_numpy())


def last_lines(table: pa.Table, keys: list[str]) -> pa.Table:
    """The last row of each distinct value of `keys`, in order."""
    kept = np.zeros(table.num_rows, bool)
    kept[last_per_key(table, keys)] = True
    return filtered(table, kept)


def filtered(table: pa.Table, mask: Any) -> pa.Table:
    """The rows where a mask is true, and not null; not a copy where it is everywhere.

    A filter goes chunk by chunk; `take` fails where the strings of a column pass 2 GiB.
    """
    kept = mask if isinstance(mask, np.ndarray) else np.asarray(pc.fill_null(mask, False))
    return table if kept.all() else table.filter(pa.array(kept))


def counts(values: Any) -> dict[Any, int]:
    """Value -> how often a column has it."""
    return {it["values"]: it["counts"] for it in pc.value_counts(values).to_pylist()}


def take_or_null(values: Any, rows: Ints) -> Any:
    """The rows of a column or table at these positions, null at -1."""
    return values.take(pa.array(rows, mask=rows < 0))


def unique_or_null(values: Column) -> Column:
    """The values, null where one occurs more than once."""
    return pc.if_else(pc.is_in(values, value_set=repeated(values)), None, values)


def repeated(values: Column) -> pa.Array:
    """Each value that occurs more than once."""
    counts = pc.value_counts(values)
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))


def merge_rows(tables: list[pa.Table], rows: list[Ints]) -> pa.Table:
    """One table in which the tables' rows stand at these positions, a permutation in all."""
    order = np.argsort(np.concatenate(rows))
    return pa.concat_tables(tables).combine_chunks().take(pa.array(order))


def _numbered(table: pa.Table, keys: list[str], name: str) -> pa.Table:
    numbers = pa.array(np.arange(table.num_rows))
    return table.select(keys).append_column(name, numbers)
