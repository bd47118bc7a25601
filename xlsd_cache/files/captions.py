"""Caption columns: where each is found beside an image, and its text, whatever wrote it.

Each line of a sidecar is an alternative caption. A field of a JSON or parquet row is one caption:
line ends in it are spaces, a list is joined as tags, and an object gives its keys.
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
CAPTION_BYTES = 2**24  # of a file beside an image; a larger one holds no caption
_BESIDE_BYTES = 2**26  # that its JSON may take when parsed: many threads parse at once


class LeftOut(str):
    """Why the file beside an image was not read: said as any remark."""

    __slots__ = ()


# suffix -> content of the file beside the image, if any
Beside = Callable[[str], bytes | LeftOut | None]

# What may be said of a caption; the first three leave it out.
MISSING, EMPTY, NOT_TEXT = "missing", "empty or blank", "not text"
BROKEN = "in a file that is not JSON"
TOO_LARGE, DAMAGED, ENCRYPTED = map(LeftOut, ("too large", "damaged", "encrypted"))
PACKED = LeftOut("compressed otherwise than by deflate")
_PLAIN = (str, int, float)
LATIN_1, NUL = "not UTF-8, read as Latin-1", "with NUL removed"


@dataclass(frozen=True)
class Column:
    """One caption column, under the name by which it is asked for."""

    name: str  # txt | json:caption | jsonl:tags | csv:text | parquet:caption | arrow:text
    kind: Kind
    field: str  # the sidecar's suffix, or the field's name, dotted where it lies deeper

    @classmethod
    def parse(cls, name: str) -> "Column":
        """Raises ValueError for a name that says nothing findable."""
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
        """Of the file beside the image that holds it; None for a row of the source's table."""
        return {"sidecar": self.field, "json": "json"}.get(self.kind)


def read_captions(
    columns: tuple[Column, ...], beside: Beside
) -> tuple[dict[str, str], Counter[Any]]:
    """Texts by column name from the files beside an image, and (column, what) of each remark."""
    texts: dict[str, str] = {}
    remarks: Counter[Any] = Counter()
    parsed: tuple[Any, list[str]] | None = None
    for column in columns:
        if column.kind == "sidecar":
            data = beside(column.field)
            text, said = ("", [MISSING]) if data is None else read_text(data)
        elif column.kind == "json":
            parsed = parsed or read_object(beside("json"))
            text, said = field_text(parsed[0], column.field)
            said = parsed[1] or said
        else:
            continue  # matched by name, all rows of a table at once
        if text:
            texts[column.name] = text
        remarks.update((column.name, what) for what in said)
    return texts, remarks


def read_text(data: bytes | LeftOut) -> tuple[str, list[str]]:
    """A sidecar's text, its lines stripped and blank ones dropped, and remarks."""
    if isinstance(data, LeftOut):
        return "", [data]
    text, said = decode_text(data)
    lines = (line.strip() for line in text.splitlines())
    text = "\n".join(line for line in lines if line)
    return text, said if text else [EMPTY]


def decode_text(data: bytes) -> tuple[str, list[str]]:
    """UTF-8 with or without BOM, UTF-16 with one, else Latin-1, in which any byte is a character.

    NUL, which no caption means, is taken out.
    """
    said = []
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
            said.append(LATIN_1)
    if "\0" in text:
        text = text.replace("\0", "")
        said.append(NUL)
    return text, said


def read_object(data: bytes | LeftOut | None) -> tuple[Any, list[str]]:
    """What a JSON file holds, and a remark where it is missing or broken."""
    if data is None:
        return None, [MISSING]
    if isinstance(data, LeftOut):
        return None, [data]
    try:
        return parse_json(decode_text(data)[0], _BESIDE_BYTES, strict=False), []
    except ValueError:
        return None, [BROKEN]


def field_text(value: Any, field: str) -> tuple[str, list[str]]:
    """The caption in a parsed object's field; a field named with its dots wins over a path.

    A part of the path that is a number takes that item of a list; a name is looked for in each
    item, and each text found is an alternative, a line of its own.
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
    """One caption of a field's value; lists are tags, and so are an object's keys."""
    said: list[str] = []
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
        said.append(NUL)
    # A lone surrogate, which JSON may spell, is in no encoding of the store's tables.
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    text = " ".join(text.split())
    return text, said if text else [EMPTY]
