"""The rows of a table file, of any format: the image that each names, and its captions."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.files.captions import Column, Kind
from xlsd_cache.files.folders import SUFFIX_PATTERN

# Usual field names, the most specific first.
PATHS = (
    "file_name filename file_path filepath image_path img_path image_file path file image img"
).split()
KEYS = ("key", "__key__")
IDS = ("id", "image_id")
URLS = ("url", "image_url", "URL")
NAMES = {"path": PATHS, "key": KEYS, "id": IDS, "url": URLS}
# The kind of caption column that a file of this name can hold.
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jgz": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "parquet",
}
TABLE_SUFFIXES = tuple(KINDS)
NOTHING = pa.scalar(None, pa.string())
EMBEDDING = (".parquet", ".arrow")  # may contain the images themselves


@dataclass(frozen=True)
class Rows:
    """The rows of a file as aligned string columns, null where a row has no value.

    A row names its image by path, or else by key, which is a path without the image's suffix; by
    url as well; by id where it has nothing else. A path without an image's suffix counts as a key.
    """

    file: Path
    path: pa.Array  # of an image file, as it stands in the row
    key: pa.Array
    id: pa.Array
    url: pa.Array
    captions: dict[str, pa.Array]  # column -> text
    remarks: Counter[tuple[str, str]]  # (column, what) -> rows
    damage: str = ""  # what could not be read of the file
    cell: str | None = None  # the column with the embedded images
    stored: bool = False  # whether the paths come from a Hugging Face image column
    labels: pa.Array | None = None  # unique names of embedded images; null where a row has none

    @classmethod
    def make(cls, file: Path, names: dict[str, pa.Array], **rest: Any) -> "Rows":
        """Rows from the fields as read: only the most specific name of each row is kept."""
        path, key, id_, url = (names[name] for name in NAMES)
        path = pc.if_else(pc.match_substring(path, "://"), NOTHING, path)
        has_suffix = pc.match_substring_regex(path, SUFFIX_PATTERN)
        key = pc.if_else(pc.is_valid(path), pc.if_else(has_suffix, NOTHING, path), key)
        named = pc.or_(pc.or_(pc.is_valid(path), pc.is_valid(key)), pc.is_valid(url))
        return cls(file, path, key, pc.if_else(named, NOTHING, id_), url, **rest)

    def __len__(self) -> int:
        return len(self.path)

    @property
    def names_urls(self) -> bool:
        """Whether some rows have a url."""
        return bool(self.url.null_count < len(self.url))

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self.file.parent


def table_kind(name: str) -> Kind | None:
    """The kind of caption column in a file of this name; None if it is no table."""
    return next((kind for suffix, kind in KINDS.items() if name.lower().endswith(suffix)), None)


def is_table(name: str) -> bool:
    """Whether a file of this name is read as rows."""
    return name.lower().endswith(TABLE_SUFFIXES)


def of_kind(file: Path, columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """The columns that a file of this name can have."""
    return tuple(column for column in columns if column.kind == table_kind(file.name))


def numbered(count: int) -> pa.Array:
    """Names for images without one: 000000000, 000000001, ..."""
    digits = np.char.zfill(np.arange(count).astype(str), 9)
    return pa.array(digits.tolist(), pa.string())


def normal_path(folder: Path, written: str) -> str:
    """The absolute path that a row names; a leading `//`, which POSIX keeps, becomes `/`."""
    path = os.path.normpath(folder / written)
    return path[1:] if path.startswith("//") and os.sep == "/" else path
