"""Opens untrusted files only if they are regular files, and parses JSON within bounds.

A pipe, socket or device under an ordinary name would block its reader, or never end.
"""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

JSON_BYTES = 2**26  # of a metadata file: 64 MiB
# Memory that parsing may take beyond the text; an object or a string takes about 64 bytes.
_PARSED_BYTES = 2**30
_OBJECT, _STRING, _ITEM = 72, 64, 8
_DECODERS = {strict: json.JSONDecoder(strict=strict) for strict in (True, False)}  # slow to make


def open_regular(path: str | Path, *, buffered: bool = True) -> IO[bytes]:
    """Open a regular file for reading. Raises OSError, also for anything else."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # do not wait for a pipe
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        file = io.FileIO(number, "rb")
    except BaseException:
        os.close(number)
        raise
    return io.BufferedReader(file) if buffered else file


def require_regular(path: str | Path) -> None:
    """Raise OSError unless `path` is a regular file; for use before C++ code opens it."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - faster than a Path
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def read_regular(path: str | Path, most: int) -> bytes:
    """All bytes of a regular file. Raises OSError, also if there are more than `most` bytes."""
    with open_regular(path, buffered=False) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size} bytes are more than {most}", os.fspath(path))
        return file.read(most)


def read_json(path: str | Path, most: int = JSON_BYTES) -> Any:
    """The value in a JSON file. Raises OSError, and ValueError for invalid JSON."""
    return parse_json(read_regular(path, most))


def parse_json(text: str | bytes, most: int = _PARSED_BYTES, *, strict: bool = True) -> Any:
    """Parse JSON. Control characters in texts are allowed unless `strict`.

    Raises ValueError for invalid or too deeply nested JSON, and for a value that would take more
    than `most` bytes of memory.
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
    """An upper bound of the parsed value's memory, without the text, counted without parsing."""

    def count(mark: str) -> int:
        return text.count(mark) if isinstance(text, str) else text.count(mark.encode())

    objects = _OBJECT * (count("[") + 3 * count("{")) + _STRING * (count('"') // 2)
    numbers = sum(count(f"{digit},") for digit in range(10))  # commas in captions follow letters
    return objects + _ITEM * (count(",") + 4 * numbers)
