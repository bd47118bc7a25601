"""Reads JSON that may be untrusted: within size bounds, and checked against a shape."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from xlsd_cache.runtime.bounded_files import open_regular, parse_json, read_json

LINE_NBYTES = 2**20  # per line of a log, which usually has some hundred
CHUNK = 1 << 20  # bytes of a log that are parsed at once


def load_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError, or ValueError for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - as for all invalid content
    return value


def read_log(path: Path) -> Iterator[list[tuple[bytes, dict[str, Any] | None]]]:
    """Some complete lines of a log at a time, in order, each with its object, or None.

    A line that is too long comes as b"".
    """
    yield from Log(path).read()


class Log:
    """A log that grows: each `read` goes on where the one before it ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0  # bytes of the complete lines that were read
        self._file = 0  # the inode that they were read from
        self._last = b""  # the newest of them

    def replaced(self) -> bool:
        """Whether the lines that were read are no longer in the file."""
        if not self._offset:
            return False
        try:
            with open_regular(self._path) as file:
                file.seek(self._offset - len(self._last))
                same = os.fstat(file.fileno()).st_ino == self._file
                return not same or file.read(len(self._last)) != self._last
        except OSError:
            return True

    def read(self) -> Iterator[list[tuple[bytes, dict[str, Any] | None]]]:
        """The lines after those that were read, as `read_log` gives them."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            if not self._offset:
                self._file = os.fstat(file.fileno()).st_ino
            file.seek(self._offset)
            while (found := _some(file))[0]:
                lines, nbytes = found
                self._offset, self._last = self._offset + nbytes, lines[-1]
                parsed = _parse([line for line in lines if line])
                yield [(line, parsed.pop(0) if line else None) for line in lines]


def objects_in(path: Path, shape: Any) -> Iterator[dict[str, Any]]:
    """The objects of a log that match a shape, see `misfit`; other lines are skipped."""
    for lines in read_log(path):
        yield from (line for _, line in lines if line is not None and not misfit(line, shape))


def _some(file: Any) -> tuple[list[bytes], int]:
    """The next complete lines, b"" for one that is too long, and all their bytes.

    An unfinished last line is left out.
    """
    found: list[bytes] = []
    nbytes = 0
    while nbytes < CHUNK and (line := file.readline(LINE_NBYTES)):
        length, part = len(line), line
        while len(part) == LINE_NBYTES and not part.endswith(b"\n"):
            line, part = b"", file.readline(LINE_NBYTES)
            length += len(part)
        if not part.endswith(b"\n"):
            break
        found.append(line)
        nbytes += length
    return found, nbytes


def _parse(lines: list[bytes]) -> list[dict[str, Any] | None]:
    try:
        found = parse_json(b"[" + b",".join(lines) + b"]")  # at once: half the time
        if len(found) == len(lines) and all(isinstance(line, dict) for line in found):
            return list(found)
    except ValueError:
        pass
    if len(lines) <= 1:
        return [None] * len(lines)
    half = len(lines) // 2
    return _parse(lines[:half]) + _parse(lines[half:])


def misfit(value: Any, shape: Any, where: str = "") -> str | None:
    """Where a value does not match a shape, in words; None if it matches.

    A shape is a type (float takes whole numbers too), [shape] for a list of any length, [one, two]
    for a list of two, a tuple of shapes for either, None, {str: shape} for any names, or a dict of
    names, those with ! needed.
    """
    if isinstance(shape, tuple):
        found = [misfit(value, each, where) for each in shape]
        return None if None in found else found[-1]
    wrong = f"{where or 'it'} has the wrong type"
    if isinstance(shape, list):
        if not isinstance(value, list) or len(shape) not in {1, len(value)}:
            return wrong
        each = shape * len(value) if len(shape) == 1 else shape
        inner = ((x, each[i], f"{where}[{i}]") for i, x in enumerate(value))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return wrong
        names = {name.rstrip("!"): name for name in shape if isinstance(name, str)}
        for name in names.values():
            if name.endswith("!") and name[:-1] not in value:
                return f"{where}.{name[:-1]} is missing".lstrip(".")
        inner = (
            (
                each,
                shape[str] if str in shape else shape[names[name]],
                f"{where}.{name}".lstrip("."),
            )
            for name, each in value.items()
            if str in shape or name in names
        )
    else:
        return None if _is(value, shape) else wrong
    return next(filter(None, (misfit(*each) for each in inner)), None)


@dataclass(frozen=True, eq=False)
class Shape:
    """In Annotated: the shape that a type hint alone does not give."""

    of: Any


def shape_of(hint: Any) -> Any:
    """The shape, see `misfit`, of a type hint."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return inner[1].of
    if is_typeddict(kind):
        needed = kind.__required_keys__
        types = get_type_hints(kind, include_extras=False).items()
        return {f"{name}!" if name in needed else name: shape_of(each) for name, each in types}
    if kind in {Union, UnionType}:
        return tuple(sorted(map(shape_of, inner), key=lambda shape: shape is not None))
    if kind in {list, tuple} and inner:
        return [shape_of(each) for each in inner]
    if kind is dict and inner[1:] not in {(), (Any,)}:
        return {str: shape_of(inner[1])}
    return {Any: object, NoneType: None}.get(kind, kind)


def _is(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None
    if kind in {int, float} and type(value) is int:
        return abs(value) < 2**53  # which all JSON readers can hold
    if kind is str and isinstance(value, str):
        return "\0" not in value  # no path, option or text has it
    return type(value) is kind or kind is object
