"""JSON lines and parquet files: a row an image, told apart by path, key or url."""

import codecs
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xlsd_cache import UserError
from xlsd_cache.captions import Column, field_text, value_text
from xlsd_cache.locate import descend

# Field names as they are met, the most telling first.
PATHS = (
    "file_name filename file_path filepath image_path img_path image_file path file image img"
).split()
KEYS = ("key", "__key__", "id", "image_id")
URLS = ("url", "image_url", "URL")
PIXELS = ("image", "img", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp", "content", "data")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jgz", ".ndjson")
_BLOCK = 65536  # rows
# Nothing at all, a control character, white space that is no single blank, or any at an end.
_UNTIDY = r"^$|\p{Cc}|[^\PZ ]|  |^ | $"


@dataclass(frozen=True)
class Rows:
    """A file's rows, aligned; strings, null where a row has none."""

    file: Path
    path: pa.Array  # of the image, as written; what an image in a cell is called
    key: pa.Array
    url: pa.Array
    captions: dict[str, pa.Array]  # column -> text
    cell: str | None  # the parquet column that holds the images themselves
    remarks: Counter[tuple[str, str]]  # (column, what) -> rows
    damage: str  # empty, or what of the file could not be read

    @property
    def names_urls(self) -> bool:
        """Whether rows say where images are from."""
        return bool(self.url.null_count < len(self.url))

    @property
    def folder(self) -> Path:
        """What relative paths start from."""
        return self.file.parent


def is_table(name: str) -> bool:
    """Whether a file of this name is read as rows."""
    return name.endswith((".parquet", *JSONL_SUFFIXES))


def read_rows(file: Path, columns: tuple[Column, ...]) -> Rows:
    """All rows with their captions in the columns that this kind of file can hold.

    Raises UserError for a file that is nothing of the sort; one that is cut short or damaged in
    places gives what is whole, and says what is not.
    """
    try:
        if file.name.endswith(".parquet"):
            return _read_parquet(file, tuple(c for c in columns if c.kind == "parquet"))
        return _read_jsonl(file, tuple(c for c in columns if c.kind == "jsonl"))
    except (OSError, pa.ArrowException) as error:
        told = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot read {file}: {told}; mend it or leave it out") from error


def _read_jsonl(file: Path, columns: tuple[Column, ...]) -> Rows:
    names = ("path", "key", "url", *(column.name for column in columns))
    blocks: list[pa.Table] = []
    values: dict[str, list[str | None]] = {name: [] for name in names}
    remarks: Counter[tuple[str, str]] = Counter()
    broken: list[int] = []
    lines = _Lines(file)
    for number, line in enumerate(lines, 1):
        row = _object(line)
        if row is None:
            if line.strip():
                broken.append(number)
            continue
        for name, fields in (("path", PATHS), ("key", KEYS), ("url", URLS)):
            values[name].append(_identity(row, fields))
        for column in columns:
            text, said = field_text(row, column.field)
            values[column.name].append(text or None)
            for what in said:
                remarks[column.name, what] += 1
        if len(values["path"]) >= _BLOCK:
            blocks.append(_strings(values))
            values = {name: [] for name in names}
    table = pa.concat_tables([*blocks, _strings(values)]).combine_chunks()
    damage = lines.damage
    if broken:
        damage = damage or f"{len(broken)} lines are no JSON objects, the first is {broken[0]}"
    if not table.num_rows:
        raise UserError(
            f"no rows in {file}{damage and ': '}{damage}; it must hold a JSON object a line"
        )
    captions = {column.name: one(table[column.name]) for column in columns}
    path, key, url = (one(table[name]) for name in ("path", "key", "url"))
    return Rows(file, path, key, url, captions, None, remarks, damage)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode(), strict=False)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


class _Lines:
    """The lines of a plain or gzipped file, up to where it is cut or damaged."""

    def __init__(self, file: Path) -> None:
        self._file, self.damage = file, ""

    def __iter__(self) -> Iterator[bytes]:
        with self._file.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(self._file) if zipped else self._file.open("rb") as lines:
            count = 0
            try:
                for line in lines:
                    count += 1
                    yield line
            except (EOFError, OSError, zlib.error) as error:
                if not zipped:
                    raise
                self.damage = f"the gzip stream ends after {count} lines: {error}"


def _identity(row: dict[str, Any], fields: tuple[str, ...] | list[str]) -> str | None:
    for field in fields:
        value = row.get(field)
        if value is None:
            continue
        if isinstance(value, str) and value and not (fields is PATHS and "://" in value):
            return value if value.isascii() else value.encode("utf-8", "replace").decode()
        if isinstance(value, int) and fields is KEYS:
            return str(value)
    return None


def _read_parquet(file: Path, columns: tuple[Column, ...]) -> Rows:
    schema = pq.read_schema(file)
    cell = next((name for name in map(_pixels(schema).get, PIXELS) if name), None)
    known = set(schema.names)
    ids = [next((n for n in names if _is_text(schema, n)), None) for names in (PATHS, KEYS, URLS)]
    if cell and ids[0] is None and cell.endswith(".bytes"):
        inner = schema.field(cell.removesuffix(".bytes")).type
        ids[0] = cell[:-5] + "path" if inner.get_field_index("path") >= 0 else None
    found = [
        column for column in columns if column.field.split(".")[0] in known or column.field in known
    ]
    wanted = [name for name in (*ids, *(column.field for column in found)) if name]
    # A file that nothing is asked of still has rows: one column of it tells how many.
    with pq.ParquetFile(file) as opened:
        table = opened.read(columns=sorted(set(wanted)) or schema.names[:1])
    path, key, url = (_text_array(table, name) for name in ids)
    remarks: Counter[tuple[str, str]] = Counter()
    captions = {}
    for column in found:
        captions[column.name], said = column_texts(one(descend(table, column.field)))
        remarks.update({(column.name, what): count for what, count in said.items()})
    if cell:
        path = _labels(path, key)
    return Rows(file, path, key, url, captions, cell, remarks, "")


def column_texts(values: pa.Array) -> tuple[pa.Array, Counter[str]]:
    """`value_text` of a whole column, null for an empty text, and its remarks.

    A string that is one line and single-spaced is its own text; only the rest is taken up one by
    one.
    """
    if pa.types.is_string(values.type):
        odd = pc.fill_null(pc.match_substring_regex(values, _UNTIDY), True)
    else:
        odd = pa.repeat(True, len(values))
    texts: list[str | None] = []
    remarks: Counter[str] = Counter()
    for value in values.filter(odd).to_pylist():
        text, said = value_text(value)
        texts.append(text or None)
        remarks.update(said)
    tidied = pa.array(texts, pa.string())
    if len(tidied) == len(values):
        return tidied, remarks
    return pc.replace_with_mask(values, odd, tidied), remarks


def _labels(path: pa.Array, key: pa.Array) -> pa.Array:
    """Names for images in cells: the first of path and key that tells all apart, else numbers."""
    for names in (path, key):
        if not names.null_count and len(names.unique()) == len(names):
            return pc.replace_substring_regex(names, "^/+", "")
    return pa.array([f"{row:09d}" for row in range(len(path))], pa.string())


def _pixels(schema: pa.Schema) -> dict[str, str]:
    """Field name -> dotted column, of the columns that hold bytes."""
    found = {}
    for field in schema:
        if _is_binary(field.type):
            found[field.name] = field.name
        elif pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            found[field.name] = f"{field.name}.bytes"
    return found


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(schema: pa.Schema, name: str) -> bool:
    if schema.get_field_index(name) < 0:
        return False
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(text or (name in KEYS and pa.types.is_integer(kind)))


def _text_array(table: pa.Table, name: str | None) -> pa.Array:
    if name is None:
        return pa.nulls(table.num_rows, pa.string())
    return one(pc.cast(descend(table, name), pa.string()))


def _strings(values: dict[str, list[str | None]]) -> pa.Table:
    return pa.table({name: pa.array(column, pa.string()) for name, column in values.items()})


def one(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def cell_sizes(file: Path, column: str) -> Iterator[int | None]:
    """Bytes of each image in a parquet column, row group by row group; None where it holds none."""
    with pq.ParquetFile(file) as table:
        for group in range(table.metadata.num_row_groups):
            values = descend(table.read_row_group(group, columns=[column]), column)
            yield from pc.binary_length(values).to_pylist()


def normal_path(folder: Path, written: str) -> str:
    """The absolute path that a row names."""
    return os.path.normpath(folder / written)
