"""Reads the rows of parquet files, and of .arrow files as Hugging Face's save_to_disk writes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.files.captions import Column, field_text, value_text
from xlsd_cache.files.table_cells import read_columns, resolve_field, rows_with_image, table_schema
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_cache.tables.columns import IDS, KEYS, NAMES, NOTHING, Rows, numbered, of_kind

PIXELS = ("image", "img", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp", "content", "data")
# Empty, a control character, white space that is not a single blank, or a blank at an end.
_UNTIDY = r"^$|\p{Cc}|[^\PZ ]|  |^ | $"


def read_arrow_table(file: Path, columns: tuple[Column, ...]) -> Rows:
    """All rows with their captions. Raises OSError and ArrowException."""
    schema = table_schema(file)
    fields = {name: _text_field(schema, options) for name, options in NAMES.items()}
    stored = _image_paths(schema)
    pixels = next((name for name in map(_pixels(schema).get, PIXELS) if name), None)
    columns = of_kind(file, columns)
    present = [column for column in columns if _top(schema, column.field) in schema.names]
    wanted = {_top(schema, column.field) for column in present}
    wanted |= {*stored, *(field for field in fields.values() if field)}
    # Where no column is wanted, one is still read for the number of rows.
    table = read_columns(file, sorted(wanted) or _smallest(schema))
    names = {name: _names(table, field) for name, field in fields.items()}
    paths = pc.coalesce(names["path"], *(_names(table, field) for field in stored))
    labels = None
    # Where a row embeds no image, the image column's path says where it is.
    names["path"] = pc.coalesce(*(_names(table, field) for field in stored), names["path"])
    if pixels:
        is_embedded = rows_with_image(file, pixels)
        labels = pc.if_else(is_embedded, _labels(paths, names["key"], names["id"]), NOTHING)
        names = {name: pc.if_else(is_embedded, NOTHING, values) for name, values in names.items()}
    captions, remarks = {}, Counter[tuple[str, str]]()
    for column in present:
        captions[column.name], counts = _captions(table, column.field)
        remarks.update({(column.name, what): count for what, count in counts.items()})
    rest = {
        "captions": captions,
        "remarks": remarks,
        "cell": pixels,
        "stored": bool(stored),
        "labels": labels,
    }
    return Rows.make(file, names, **rest)


def holds_images(file: Path) -> bool:
    """Whether a table embeds images, or names them in a Hugging Face image column."""
    schema = table_schema(file)
    return bool(_image_paths(schema) or _pixels(schema).keys() & set(PIXELS))


def arrow_files(folder: Path, names: list[str]) -> set[str]:
    """The .arrow files of a folder that are data: save_to_disk lists them, and not its caches."""
    if "state.json" in names:
        try:
            files = read_json(folder / "state.json")["_data_files"]
            return {str(file["filename"]) for file in files}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # another program's state.json
    return {name for name in names if name.endswith(".arrow")}


def column_texts(values: pa.Array) -> tuple[pa.Array, Counter[str]]:
    """`value_text` of a whole column, null for an empty text, and its remarks.

    A string that is one line and single-spaced stays as it is; only the others are read one by one.
    """
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
        values = pc.cast(values, pa.string())
    if pa.types.is_string(values.type):
        odd = pc.fill_null(pc.match_substring_regex(values, _UNTIDY), True)
    else:
        odd = pa.repeat(True, len(values))
    texts: list[str | None] = []
    remarks: Counter[str] = Counter()
    for value in values.filter(odd).to_pylist():
        text, notes = value_text(value)
        texts.append(text or None)
        remarks.update(notes)
    tidied = pa.array(texts, pa.string())
    if len(tidied) == len(values):
        return tidied, remarks
    return pc.replace_with_mask(values, odd, tidied), remarks


def _captions(table: pa.Table, field: str) -> tuple[pa.Array, Counter[str]]:
    """The texts of a column, or of a field nested in structs and lists."""
    values, rest = resolve_field(table, field)
    if not rest:
        return column_texts(values.combine_chunks())
    texts: list[str | None] = []
    remarks: Counter[str] = Counter()
    for chunk in values.chunks:
        for value in chunk.to_pylist():
            text, notes = field_text(value, ".".join(rest))
            texts.append(text or None)
            remarks.update(notes)
    return pa.array(texts, pa.string()), remarks


def _labels(path: pa.Array, key: pa.Array, id_: pa.Array) -> pa.Array:
    """Unique names for embedded images: the first unique one of path, key and id, or numbers."""
    for column in (path, key, id_):
        names = pc.replace_substring_regex(column, "^/+", "")
        if not names.null_count and len(names.unique()) == len(names):
            return names
    return numbered(len(path))


def _pixels(schema: pa.Schema) -> dict[str, str]:
    """Field name -> dotted column, of the columns with bytes."""
    columns = {}
    for field in schema:
        if _is_binary(field.type):
            columns[field.name] = field.name
        elif pa.types.is_struct(field.type):
            at = field.type.get_field_index("bytes")
            if at >= 0 and _is_binary(field.type.field(at).type):
                columns[field.name] = f"{field.name}.bytes"
    return columns


def _image_paths(schema: pa.Schema) -> list[str]:
    """The dotted path fields of Hugging Face's image columns, a struct of bytes and path."""
    structs = {f.name: f.type for f in schema if pa.types.is_struct(f.type)}
    return [
        f"{name}.path"
        for name in PIXELS
        if name in structs
        and structs[name].get_field_index("bytes") >= 0
        and structs[name].get_field_index("path") >= 0
        and _is_text(structs[name].field("path").type)
    ]


def _text_field(schema: pa.Schema, options: Sequence[str]) -> str | None:
    """The first of these columns that exists and has names."""
    for name in options:
        if schema.get_field_index(name) >= 0:
            kind = schema.field(name).type
            if _is_text(kind) or (options in (KEYS, IDS) and pa.types.is_integer(kind)):
                return name
    return None


def _top(schema: pa.Schema, field: str) -> str:
    """The column that a dotted field is in."""
    return field if field in schema.names else field.partition(".")[0]


def _smallest(schema: pa.Schema) -> list[str]:
    """A column that is read quickly: not the images, if there is another."""
    narrow = [f.name for f in schema if pa.types.is_primitive(f.type) or _is_text(f.type)]
    return (narrow or schema.names)[:1]


def _names(table: pa.Table, field: str | None) -> pa.Array:
    """The column as strings, empty ones null."""
    if field is None:
        return pa.nulls(table.num_rows, pa.string())
    names = resolve_field(table, field)[0].cast(pa.string()).combine_chunks()
    return pc.if_else(pc.equal(names, ""), NOTHING, names)


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
