"""Which row of a table is about which image: by path, key or url, else by an unambiguous stem."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.tables import Rows, one

SUFFIX = r"\.[^./]*$"
FOLDERS = r"^.*/"


def match(rows: Rows, images: pa.Table) -> NDArray[np.int64]:
    """int64 [images]: the row of each, or -1.

    `images` has the columns source, relative (its path in its source, without suffix) and url,
    which may be null. Where rows name an image twice, the last counts; a stem that several images
    or several rows have names none of them.
    """
    relative, stem = one(images["relative"]), stems(one(images["relative"]))
    written = pc.replace_substring_regex(rows.path, r"^(\./)+", "")
    bare = pc.replace_substring_regex(written, SUFFIX, "")
    at = look_up(one(images["source"]), _absolute(rows.folder, written))
    for wanted, have in (
        (relative, bare),
        (relative, rows.key),
        (only_once(stem), rows.key),
        (one(images["url"]), rows.url),
        (only_once(stem), only_once(stems(bare))),
    ):
        at = np.where(at < 0, look_up(wanted, have), at)
    return at


def stems(names: pa.Array) -> pa.Array:
    """The last part of each path."""
    return pc.replace_substring_regex(names, FOLDERS, "")


def look_up(wanted: pa.Array, have: pa.Array) -> NDArray[np.int64]:
    """int64 [wanted]: where in `have` the last equal value is, or -1; a null equals nothing."""
    if have.null_count == len(have) or wanted.null_count == len(wanted):
        return np.full(len(wanted), -1)
    backwards = have.take(pa.array(np.arange(len(have))[::-1]))
    found = pc.index_in(wanted, value_set=backwards, skip_nulls=True)
    at: NDArray[np.int64] = pc.fill_null(found, len(have)).to_numpy().astype(np.int64)
    return len(have) - 1 - at


def only_once(names: pa.Array) -> pa.Array:
    """The same, null where a name is there more than once."""
    counts = pc.value_counts(names)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    return pc.if_else(pc.is_in(names, value_set=repeated), pa.scalar(None, pa.string()), names)


def _absolute(folder: Path, written: pa.Array) -> pa.Array:
    joined = pc.binary_join_element_wise(f"{folder}", written, "/")
    return pc.if_else(pc.starts_with(written, "/"), written, joined)
