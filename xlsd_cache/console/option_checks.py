"""What every option of both programs is checked for: bounds, empty texts, paths to be written.

The types below stand in the commands' dataclasses, and `check_options`, called as one is made,
walks its fields.
"""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from xlsd_cache.errors import UserError

LONGEST = 200  # bytes of a name: file systems hold 255, and temporary files have longer ones
POSITIONAL = get_args(Positional[int])[1]  # what it notes of a field


@dataclass(frozen=True)
class Within:
    """Bounds of a number, both allowed but for `least` where `above`."""

    least: float
    most: float
    above: bool = False


@dataclass(frozen=True)
class Target:
    """A path that a command writes: a `folder`, a `file`, or either."""

    kind: str


@dataclass(frozen=True)
class MayBeEmpty:
    """A text that may be empty."""


Count = Annotated[int, Within(1, 10**9)]
Every = Annotated[int, Within(0, 10**9)]  # 0 turns it off
Share = Annotated[float, Within(0, 1)]
Factor = Annotated[float, Within(1e-3, 1e3)]  # a VAE's scaling factor; those in use: 0.13 to 1.6
Threads = Annotated[int, Within(1, 1024)]
Folder = Annotated[Path, Target("folder")]
File = Annotated[Path, Target("file")]


def check_options(config: Any) -> None:
    """Raise UserError for the first value that no run of the command can use."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        hint, value = hints[field.name], getattr(config, field.name)
        option = option_of(field.name, hint)
        for kind, notes in leaves(hint):
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, kind) or (kind is float and type(each) is int):
                    _check(each, notes, option)


def leaves(hint: Any, notes: tuple[Any, ...] = ()) -> Iterator[tuple[type, tuple[Any, ...]]]:
    """The number, text and path types within a field's type, each with what is noted of it."""
    if get_origin(hint) is Annotated:
        inner, *more = get_args(hint)
        yield from leaves(inner, (*notes, *more))
    elif get_origin(hint) in {Union, UnionType, tuple}:
        for inner in dict.fromkeys(get_args(hint)):
            yield from leaves(inner, notes)
    elif hint in {int, float, str, Path}:
        yield hint, notes


def marks_of(hint: Any) -> tuple[Any, ...]:
    """What is noted of a field as a whole."""
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def option_of(name: str, hint: Any) -> str:
    """How the command line has a field: --its-name, or NAME for a positional one."""
    marks = marks_of(hint)
    if POSITIONAL in marks:
        return next((it.metavar for it in marks if getattr(it, "metavar", None)), name.upper())
    given = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
    return f"--{given.replace('_', '-')}"


def _check(value: Any, notes: tuple[Any, ...], option: str) -> None:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        for bounds in notes:
            if isinstance(bounds, Within):
                refuse_outside(value, bounds, option)
        return
    if "\0" in str(value):
        raise UserError(f"{option} {str(value)!r} holds a NUL character; leave that out")
    if value == "" and MayBeEmpty() not in notes:
        raise UserError(f"{option} '' is empty; give a value, or leave {option} out")
    for target in notes:
        if isinstance(target, Target):
            refuse_unwritable(value, option, target.kind)


def refuse_outside(value: float, bounds: Within, option: str) -> None:
    """Raises UserError for a number out of its bounds, or none at all."""
    least, most = f"{bounds.least:.10g}", f"{bounds.most:.10g}"
    told = f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}"
    if math.isnan(value):
        raise UserError(f"{told} is not a number; give one from {least} to {most}")
    if bounds.above and value <= bounds.least:
        raise UserError(f"{told} is not above {least}; raise it")
    if value < bounds.least:
        raise UserError(f"{told} is less than {least}; raise it")
    if value > bounds.most:
        raise UserError(f"{told} is more than {most}; lower it")


def refuse_empty(words: Sequence[str], kind: type[Any] | None = None) -> None:
    """Raises UserError for an empty word: as a path it would mean the current folder.

    But for options of `kind` that may be empty.
    """
    hints = get_type_hints(kind, include_extras=True) if kind else {}
    may = {
        option_of(name, hint)
        for name, hint in hints.items()
        if any(MayBeEmpty() in notes for _, notes in leaves(hint))
    }
    for before, word in zip(["", *words], words, strict=False):
        option, _, value = word.partition("=")
        if not word:
            option, value = before, ""
        elif not (word.startswith("--") and word.endswith("=")):
            continue
        if not value and option not in may:
            told = option if option.startswith("--") else "an argument"
            raise UserError(f"{told} '' is empty; give a value, or leave it out")


def refuse_unwritable(path: Path, option: str, kind: str = "folder") -> None:
    """Raises UserError where a folder, or file, of this name can be neither made nor written."""
    told, path = f"{option} {path}", path.absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    missing = path.parts[len(there.parts) :]
    if there.is_symlink() and not there.exists():
        raise UserError(f"{told}: {there} is a link to nothing; name another {kind}")
    if missing and not there.is_dir():
        raise UserError(f"{told}: {there} is a file and no folder; name another {kind}")
    if not missing and kind == "folder" and not there.is_dir():
        raise UserError(f"{told} is a file and no folder; name another folder")
    if not missing and kind == "file" and there.is_dir():
        raise UserError(f"{told} is a folder; name a file")
    if long := next((name for name in missing if len(os.fsencode(name)) > LONGEST), None):
        raise UserError(
            f"{option} has a name of {len(os.fsencode(long))} bytes, {long[:20]}...; name a "
            f"{kind} in at most {LONGEST}"
        )
    folder = there if there.is_dir() else there.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{told} cannot be written: {folder}: {error.strerror}; name another {kind}"
        ) from error
