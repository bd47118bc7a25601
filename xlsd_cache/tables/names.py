"""Columns of names (paths, keys): normalised for comparison, and split into their parts."""

import os

import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.runtime.arrow import Ints

SUFFIX = r"\.[^./]*$"
FOLDERS = r"^.*/"


def canonical(names: pa.Array) -> pa.Array:
    """Paths in one form: forward slashes, NFC accents, no `.` or `..` parts."""
    if names.null_count == len(names):
        return names
    if pc.any(pc.match_substring_regex(names, r"\\|//|^\./")).as_py():
        names = pc.replace_substring_regex(names, r"[\\/]+", "/")
        names = pc.replace_substring_regex(names, r"^(\./)+", "")
    dotted = pc.fill_null(pc.match_substring_regex(names, r"(^|/)\.\.?/"), False)
    if pc.any(dotted).as_py():
        plain = [os.path.normpath(name) for name in names.filter(dotted).to_pylist()]
        names = pc.replace_with_mask(names, dotted, pa.array(plain, pa.string()))
    if pc.any(pc.invert(pc.string_is_ascii(names))).as_py():
        names = pc.utf8_normalize(names, "NFC")
    return names


def stemmed(names: pa.Array) -> pa.Array:
    """The names without their suffix."""
    return pc.replace_substring_regex(names, SUFFIX, "")


def last_part(names: pa.Array) -> pa.Array:
    """The file names of paths."""
    return pc.replace_substring_regex(names, FOLDERS, "")


def joined(arrays: list[pa.Array]) -> pa.Array:
    """The columns as one, strings."""
    return pa.concat_arrays([pa.array([], pa.string()), *arrays])


def below_folder(folder: str, names: pa.Array) -> pa.Array:
    """FOLDER/NAME of each."""
    return pc.binary_join_element_wise(folder.rstrip("/"), names, "/")


def bisect(names: pa.Array, order: Ints, wanted: str) -> int:
    """How many of the names, in this order, come before `wanted` by their bytes."""
    low, high, sought = 0, len(order), wanted.encode()
    while low < high:
        middle = (low + high) // 2
        name = names[int(order[middle])].as_py()
        if name is not None and name.encode() < sought:
            low = middle + 1
        else:
            high = middle
    return low
