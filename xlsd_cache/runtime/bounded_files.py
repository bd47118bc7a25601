"""Files that strangers made: opened only where they are regular files, and parsed with bounds.

A pipe, a socket or a device under an ordinary name would block its reader, or never end.
"""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

JSON_BYTES = 2**26  # of a file that describes others: 64 MiB
# What parsing may take of memory beside the text: an object costs some 64 bytes, so does a string.
_PARSED_BYTES = 2**30
_OBJECT, _STRING, _ITEM = 72, 64, 8
_DECODERS = {strict: json.JSONDecoder(strict=strict) for strict in (True, False)}  # dear to make


def open_regular(path: str | Path, *, buffered: bool = True) -> IO[bytes]:
    """Open a regular file for reading. Raises OSError, also for what is no regular file."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # of a pipe: do not wait
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        file = io.FileIO(number, "rb")
    except BaseException:
        os.close(number)
        raise
    return io.BufferedReader(file) if buffered else file


def require_regular(path: str | Path) -> None:
    """Raises OSError where `path` is not there, or is no regular file: for C++ that opens it."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - once a file: a Path costs more
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def read_regular(path: str | Path, most: int) -> bytes:
    """All bytes of a regular file. Raises OSError, also for one of more than `most` bytes."""
    with open_regular(path, buffered=False) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size} bytes are more than {most}", os.fspath(path))
        return file.read(most)


def read_json(path: str | Path, most: int = JSON_BYTES) -> Any:
    """The value in a JSON file. Raises OSError, and ValueError for what is not JSON."""
    return parse_json(read_regular(path, most))


def parse_json(text: str | bytes, most: int = _PARSED_BYTES, *, strict: bool = True) -> Any:
    """The value, control characters in texts let in unless `strict`.

    Raises ValueError also for JSON nested too deep, and for what would take more than `most` bytes.
    """
    if _OBJECT * len(text) > most and _parsed_bytes(text) > most:
        raise ValueError(f"parsed it would take more than {most >> 20} MiB of memory")
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")  # as json.loads does it
    try:
        return _DECODERS[strict].decode(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def _parsed_bytes(text: str | bytes) -> int:
    """What the parsed value takes at most, the text itself left out; counted without parsing."""

    def count(mark: str) -> int:
        return text.count(mark) if isinstance(text, str) else text.count(mark.encode())

    objects = _OBJECT * (count("[") + 3 * count("{")) + _STRING * (count('"') // 2)
    numbers = sum(count(f"{digit},") for digit in range(10))  # commas in captions follow letters
    return objects + _ITEM * (count(",") + 4 * numbers)
