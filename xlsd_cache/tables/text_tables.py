"""Reads the rows of JSON lines, JSON arrays and dictionaries, and CSV files."""

import codecs
import csv
import gzip
import io
import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column, decode_text, field_text
from xlsd_cache.files.folders import is_image
from xlsd_cache.runtime.bounded_files import open_regular, parse_json
from xlsd_cache.tables.columns import IDS, KEYS, NAMES, PATHS, Rows, of_kind

_BLOCK = 65536  # rows
_LINE_BYTES = 2**24  # the longest line or CSV field that is read
_JSON_BYTES = 2**29  # the largest array or dictionary that is read; lines have no such limit
_INFLATED, _TIMES = 2**28, 64  # a gzipped table may inflate to so many bytes, or times its size
_LONG_LINES = 64  # a line of up to so many _LINE_BYTES is skipped; a longer one ends the reading
# The start of a dictionary of objects.
_DICTIONARY = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{')
Row = dict[str, Any]


def read_text_table(file: Path, columns: tuple[Column, ...]) -> Rows:
    """All rows with their captions; of a truncated or damaged file those that are intact.

    Raises UserError for a file without rows, and OSError.
    """
    columns = of_kind(file, columns)
    names = (*NAMES, *(column.name for column in columns))
    blocks: list[pa.Table] = []
    values: dict[str, list[str | None]] = {name: [] for name in names}
    remarks: Counter[tuple[str, str]] = Counter()
    source = _Objects(file)
    for row in source:
        for name, fields in NAMES.items():
            values[name].append(_identity(row, fields))
        for column in columns:
            text, notes = field_text(row, column.field)
            values[column.name].append(text or None)
            for what in notes:
                remarks[column.name, what] += 1
        if len(values["path"]) >= _BLOCK:
            blocks.append(_strings(values))
            values = {name: [] for name in names}
    table = pa.concat_tables([*blocks, _strings(values)]).combine_chunks()
    if not table.num_rows:
        raise UserError(
            f"no rows in {file}{source.damage and ': '}{source.damage}; expected JSON lines, a "
            f"JSON array or dictionary of objects, or CSV with a header"
        )
    captions = {column.name: table[column.name].combine_chunks() for column in columns}
    named = {name: table[name].combine_chunks() for name in NAMES}
    return Rows.make(file, named, captions=captions, remarks=remarks, damage=source.damage)


def holds_rows(file: Path) -> bool:
    """Whether a .json file has rows for many images, judged by its first bytes.

    Most .json files in a folder are about the one image next to them. Raises OSError.
    """
    with open_regular(file) as opened:
        head: bytes = opened.read(4096).removeprefix(codecs.BOM_UTF8)
    return head.lstrip()[:1] == b"[" or bool(_DICTIONARY.match(head))


class _Objects:
    """Iterates over a file's rows up to where it is damaged; `damage` then says how."""

    def __init__(self, file: Path) -> None:
        self.file, self.damage = file, ""

    def __iter__(self) -> Iterator[Row]:
        name = self.file.name.lower()
        if name.endswith((".csv", ".tsv")):
            return self._csv("\t" if name.endswith(".tsv") else ",")
        if name.endswith(".json") or self._begins_an_array():
            return self._json()
        return self._lines()

    def _begins_an_array(self) -> bool:
        with self._open() as opened:
            head: bytes = opened.read(4096)
        return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["

    def _open(self) -> Any:
        """The file; a gzipped one is inflated, up to the limit for tables."""
        file = open_regular(self.file)
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not zipped:
            return file
        most = max(_INFLATED, _TIMES * os.fstat(file.fileno()).st_size)
        return io.BufferedReader(_Bounded(file, most))

    def _json(self) -> Iterator[Row]:
        """An array of objects, or a dictionary by image such as kohya's meta_cap.json."""
        with self._open() as opened:
            data = opened.read(_JSON_BYTES + 1)
        if len(data) > _JSON_BYTES:
            raise UserError(f"{self.file} is JSON of more than 512 MiB; convert it to JSON lines")
        try:
            value = parse_json(decode_text(data)[0], strict=False)
        except ValueError:
            yield from self._lines()  # JSON lines in a .json file
            return
        items = value if isinstance(value, list) else [value]
        if isinstance(value, dict) and value:
            objects = all(isinstance(entry, dict) for entry in value.values())
            if objects or all(map(is_image, value)):
                items = [_named(name, entry) for name, entry in value.items()]
        broken = [number for number, item in enumerate(items, 1) if not isinstance(item, dict)]
        self._note_broken(broken, "items")
        yield from (item for item in items if isinstance(item, dict))

    def _lines(self) -> Iterator[Row]:
        broken: list[int] = []
        for number, line in enumerate(self._whole_lines(), 1):
            row = _object(line)
            if row is not None:
                yield row
            elif line.strip():
                broken.append(number)
        self._note_broken(broken, "lines")

    def _whole_lines(self) -> Iterator[bytes]:
        with self._open() as lines:
            count = 0
            try:
                while line := lines.readline(_LINE_BYTES):
                    count += 1
                    yield line
                    if not _skip_rest(lines, line):
                        self.damage = f"line {count} has no end; the rest is not read"
                        return
            except (EOFError, OSError, zlib.error) as error:
                if isinstance(error, OSError) and error.errno:
                    raise
                self.damage = f"the gzip stream ends after {count} lines: {error}"

    def _csv(self, delimiter: str) -> Iterator[Row]:
        encoding = self._encoding()
        with self._open() as opened, io.TextIOWrapper(opened, encoding, "replace", "") as text:
            header = text.readline(_LINE_BYTES)
            if delimiter not in header and ";" in header:  # European spreadsheets
                delimiter = ";"
            csv.field_size_limit(_LINE_BYTES)
            lines = itertools.chain([header], _text_lines(text))
            reader = csv.DictReader((it.replace("\0", "") for it in lines), delimiter=delimiter)
            broken: list[int] = []
            try:
                for row in reader:
                    if None in row:  # more cells than the header has
                        broken.append(reader.line_num)
                    else:
                        yield {str(name).strip(): value or None for name, value in row.items()}
            except (csv.Error, EOFError, zlib.error, _TooMuch) as error:
                self.damage = f"unreadable from line {reader.line_num} on: {error}"
            self._note_broken(broken, "lines", "rows of the header's length")

    def _encoding(self) -> str:
        """UTF-8 or UTF-16 by its byte order mark; Latin-1 if it is not valid UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with self._open() as opened:
            try:
                piece = opened.read(2**20)
                if piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    return "utf-16"
                while piece:
                    decoder.decode(piece)
                    piece = opened.read(2**20)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return "latin-1"
            except (EOFError, zlib.error, _TooMuch, OSError) as error:  # reported when it is read
                if isinstance(error, OSError) and error.errno:
                    raise
        return "utf-8-sig"

    def _note_broken(self, broken: list[int], what: str, wanted: str = "JSON objects") -> None:
        if broken and not self.damage:
            self.damage = f"{len(broken)} {what} are no {wanted}, the first is {broken[0]}"


class _TooMuch(OSError):
    """A gzip stream that inflates beyond the limit."""


class _Bounded(io.RawIOBase):
    """A gzip stream of which at most `most` bytes are read."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._gzip, self._most, self._read = file, gzip.GzipFile(fileobj=file), most, 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As io.RawIOBase.readinto; raises gzip's errors, and OSError beyond `most`."""
        data = self._gzip.read1(len(buffer))
        self._read += len(data)
        if self._read > self._most:
            raise _TooMuch(f"it inflates to more than {self._most >> 20} MiB; decompress it")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file as well."""
        self._file.close()
        super().close()


def _skip_rest(lines: IO[bytes], line: bytes) -> bool:
    """Skip the rest of the line that starts with `line`; False where its end is too far away."""
    for _ in range(_LONG_LINES):
        if len(line) < _LINE_BYTES or line.endswith(b"\n"):
            return True
        line = lines.readline(_LINE_BYTES)
    return False


def _text_lines(text: IO[str]) -> Iterator[str]:
    """The lines. Raises csv.Error for one that is too long."""
    while line := text.readline(_LINE_BYTES):
        if len(line) == _LINE_BYTES and not line.endswith(("\n", "\r")):
            raise csv.Error(f"a line of more than {_LINE_BYTES >> 20} MiB")
        yield line


def _named(name: str, entry: Any) -> Row:
    """A dictionary's entry as a row; only the dictionary's key names the image."""
    row = dict(entry) if isinstance(entry, dict) else {"caption": entry, "text": entry}
    for field in (*PATHS, *KEYS, *IDS):
        row.pop(field, None)
    return {"file_name" if is_image(name) else "key": name, **row}


def _object(line: bytes) -> Row | None:
    try:
        row = parse_json(line.removeprefix(codecs.BOM_UTF8).decode(), strict=False)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _identity(row: Row, fields: Sequence[str]) -> str | None:
    for field in fields:
        value = row.get(field)
        if value is None:
            continue
        if isinstance(value, dict) and fields is PATHS:  # a Hugging Face image, as JSON
            value = value.get("path")
        if isinstance(value, str) and value and not (fields is PATHS and "://" in value):
            return value if value.isascii() else value.encode("utf-8", "replace").decode()
        if isinstance(value, int) and not isinstance(value, bool) and fields in (KEYS, IDS):
            return str(value)
    return None


def _strings(values: dict[str, list[str | None]]) -> pa.Table:
    return pa.table({name: pa.array(column, pa.string()) for name, column in values.items()})
