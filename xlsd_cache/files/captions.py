"""Caption columns: parses their names, and reads captions from sidecar files and table fields.

Each line of a text sidecar is an alternative caption. A field of JSON or a table's row is one
caption: line ends become spaces, a list is joined as tags, and an object gives its keys.
"""

import codecs
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from xlsd_cache.runtime.bounded_files import parse_json

Kind = Literal["sidecar", "json", "jsonl", "csv", "parquet"]
_KINDS: dict[str, Kind] = {
    "json": "json", "jsonl": "jsonl", "csv": "csv", "parquet": "parquet", "arrow": "parquet",
}  # fmt: skip
CAPTION_BYTES = 2**24  # of a sidecar; larger files are not read
_PARSED_BYTES = 2**26  # memory of one sidecar's parsed JSON: many threads parse at once


class NotRead(str):
    """A remark in place of a sidecar's content: why it was not read."""

    __slots__ = ()


# suffix -> content of the image's sidecar, if there is one
ReadSidecar = Callable[[str], bytes | NotRead | None]

# Remarks on a caption; with the first three there is none.
MISSING, EMPTY, NOT_TEXT = "missing", "empty or blank", "not text"
BROKEN = "in a file that is not JSON"
TOO_LARGE, DAMAGED, ENCRYPTED = map(NotRead, ("too large", "damaged", "encrypted"))
PACKED = NotRead("compressed otherwise than by deflate")
_PLAIN = (str, int, float)
LATIN_1, NUL = "not UTF-8, read as Latin-1", "with NUL removed"


@dataclass(frozen=True)
class Column:
    """A caption column, as named on the command line."""

    name: str  # txt | json:caption | jsonl:tags | csv:text | parquet:caption | arrow:text
    kind: Kind
    field: str  # the sidecar's suffix, or the field's name, dotted if nested

    @classmethod
    def parse(cls, name: str) -> "Column":
        """Parse a name. Raises ValueError if it is invalid."""
        before, colon, field = name.partition(":")
        if not colon:
            if not name or "/" in name:
                raise ValueError(name)
            return cls(name, "sidecar", name)
        if before not in _KINDS or not field:
            raise ValueError(name)
        return cls(name, _KINDS[before], field)

    @property
    def suffix(self) -> str | None:
        """Suffix of the sidecar with the caption; None for a column of a table."""
        return {"sidecar": self.field, "json": "json"}.get(self.kind)


def read_captions(
    columns: tuple[Column, ...], sidecar: ReadSidecar
) -> tuple[dict[str, str], Counter[Any]]:
    """Column name -> text, from the sidecars of an image, and a count of (column, remark)."""
    texts: dict[str, str] = {}
    remarks: Counter[Any] = Counter()
    parsed: tuple[Any, list[str]] | None = None
    for column in columns:
        if column.kind == "sidecar":
            data = sidecar(column.field)
            text, noted = ("", [MISSING]) if data is None else read_text(data)
        elif column.kind == "json":
            parsed = parsed or read_object(sidecar("json"))
            text, noted = field_text(parsed[0], column.field)
            noted = parsed[1] or noted
        else:
            continue  # matched by name, all rows of a table at once
        if text:
            texts[column.name] = text
        remarks.update((column.name, remark) for remark in noted)
    return texts, remarks


def read_text(data: bytes | NotRead) -> tuple[str, list[str]]:
    """A sidecar's text, with lines stripped and blank ones dropped, and remarks."""
    if isinstance(data, NotRead):
        return "", [data]
    text, remarks = decode_text(data)
    lines = (line.strip() for line in text.splitlines())
    text = "\n".join(line for line in lines if line)
    return text, remarks if text else [EMPTY]


def decode_text(data: bytes) -> tuple[str, list[str]]:
    """Decode UTF-8 with or without BOM, UTF-16 with BOM, else Latin-1; and remarks.

    NUL characters are removed.
    """
    remarks = []
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
            remarks.append(LATIN_1)
    if "\0" in text:
        text = text.replace("\0", "")
        remarks.append(NUL)
    return text, remarks


def read_object(data: bytes | NotRead | None) -> tuple[Any, list[str]]:
    """The value in a JSON sidecar, and a remark if it is missing or broken."""
    if data is None:
        return None, [MISSING]
    if isinstance(data, NotRead):
        return None, [data]
    try:
        return parse_json(decode_text(data)[0], _PARSED_BYTES, strict=False), []
    except ValueError:
        return None, [BROKEN]


def field_text(value: Any, field: str) -> tuple[str, list[str]]:
    """The caption in a field of a parsed object, and remarks.

    A dotted field is a path, unless the object has a field of that whole name. In a list, a number
    in the path selects an item; a name is searched in all items, and each text is an alternative
    caption on a line of its own.
    """
    if isinstance(value, dict) and field in value:
        return value_text(value[field])
    return _descend(value, field.split("."))


def _descend(value: Any, path: list[str]) -> tuple[str, list[str]]:
    for depth, name in enumerate(path):
        if isinstance(value, list) and name.removeprefix("-").isdecimal():
            if not -len(value) <= int(name) < len(value):
                return "", [MISSING]
            value = value[int(name)]
        elif isinstance(value, list):
            texts = (_descend(item, path[depth:]) for item in value if isinstance(item, dict))
            lines = dict.fromkeys(text for text, _ in texts if text)
            return "\n".join(lines), [] if lines else [MISSING]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            return "", [MISSING]
    return value_text(value)


def value_text(value: Any) -> tuple[str, list[str]]:
    """The caption in a field's value, and remarks. Lists, and an object's keys, are tags."""
    remarks: list[str] = []
    if value is None:
        return "", [MISSING]
    if isinstance(value, dict):
        value = list(value)
    if isinstance(value, list):
        if not all(isinstance(item, _PLAIN) for item in value):
            return "", [NOT_TEXT]
        value = ", ".join(tag for item in value if (tag := str(item).strip()))
    if isinstance(value, bool) or not isinstance(value, _PLAIN):
        return "", [NOT_TEXT]
    text = str(value)
    if "\0" in text:
        text = text.replace("\0", "")
        remarks.append(NUL)
    # JSON may contain lone surrogates, which UTF-8 cannot encode.
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    text = " ".join(text.split())
    return text, remarks if text else [EMPTY]
