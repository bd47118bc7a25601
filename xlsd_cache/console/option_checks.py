"""Checks the values of options: bounds, empty texts, output paths that cannot be written.

The options dataclasses use the types below, and call `check_options` when they are created.
"""

import math
import os
import shlex
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from xlsd_cache.errors import UserError

LONGEST = 200  # bytes of a name: file systems allow 255, and temporary names are longer
POSITIONAL = get_args(Positional[int])[1]  # the annotation that it adds to a field


@dataclass(frozen=True)
class Within:
    """Inclusive bounds of a number; with `above`, `least` itself is excluded."""

    least: float
    most: float
    above: bool = False


@dataclass(frozen=True)
class Target:
    """Marks a path that a command writes: a `folder`, a `file`, or either."""

    kind: str


@dataclass(frozen=True)
class MayBeEmpty:
    """Marks a text that may be empty."""


Count = Annotated[int, Within(1, 10**9)]
Every = Annotated[int, Within(0, 10**9)]  # 0 turns it off
Share = Annotated[float, Within(0, 1)]
Factor = Annotated[float, Within(1e-3, 1e3)]  # a VAE's scaling factor; 0.13 to 1.6 in practice
Threads = Annotated[int, Within(1, 1024)]
Folder = Annotated[Path, Target("folder")]
File = Annotated[Path, Target("file")]


class CheckedOptions:
    """Options that are checked when they are made: each value alone, then values together."""

    def __post_init__(self) -> None:
        """Raise UserError for what no run of the command can use, before anything is read."""
        check_options(self)
        self.check()

    def check(self) -> None:
        """Raise UserError for values that do not go together."""


def check_options(config: Any) -> None:
    """Raise UserError for the first field whose value is not allowed."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        hint, value = hints[field.name], getattr(config, field.name)
        option = option_of(field.name, hint)
        for kind, notes in leaves(hint):
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, kind) or (kind is float and type(each) is int):
                    _check(each, notes, option)


def leaves(hint: Any) -> Iterator[tuple[type, tuple[Any, ...]]]:
    """The number, text and path types within a field's type, each with its annotations."""
    return (leaf for leaf in all_leaves(hint) if leaf[0] in {int, float, str, Path})


def all_leaves(hint: Any, notes: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The same with Literals and all other types."""
    if get_origin(hint) is Annotated:
        inner, *more = get_args(hint)
        yield from all_leaves(inner, (*notes, *more))
    elif get_origin(hint) in {Union, UnionType, tuple}:
        for inner in dict.fromkeys(get_args(hint)):
            yield from all_leaves(inner, notes)
    elif hint is not Ellipsis:
        yield hint, notes


def marks_of(hint: Any) -> tuple[Any, ...]:
    """The annotations of a field as a whole."""
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def option_of(name: str, hint: Any) -> str:
    """A field's name on the command line: --its-name, or NAME if it is positional."""
    marks = marks_of(hint)
    if POSITIONAL in marks:
        return next((it.metavar for it in marks if getattr(it, "metavar", None)), name.upper())
    given = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
    return f"--{given.replace('_', '-')}"


def as_flags(options: Any, usual: Any, leave_out: Collection[str] = ()) -> str:
    """The options that differ from those of `usual`, an instance of the same class, as flags."""
    words: list[str] = []
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value, option = getattr(options, name), option_of(name, hint)
        if name in leave_out or value == getattr(usual, name):
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
            continue
        words += [option] if option.startswith("--") else []
        words += [str(it) for it in (value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _check(value: Any, notes: tuple[Any, ...], option: str) -> None:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        for bounds in notes:
            if isinstance(bounds, Within):
                refuse_outside(value, bounds, option)
        return
    if "\0" in str(value):
        raise UserError(f"{option} {str(value)!r} contains a NUL character; remove it")
    if value == "" and MayBeEmpty() not in notes:
        raise UserError(f"{option} '' is empty; give a value, or leave {option} out")
    for target in notes:
        if isinstance(target, Target):
            refuse_unwritable(value, option, target.kind)


def refuse_outside(value: float, bounds: Within, option: str) -> None:
    """Raise UserError for a number out of its bounds, or NaN."""
    least, most = f"{bounds.least:.10g}", f"{bounds.most:.10g}"
    given = f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}"
    if math.isnan(value):
        raise UserError(f"{given} is not a number; give one from {least} to {most}")
    if bounds.above and value <= bounds.least:
        raise UserError(f"{given} is not above {least}; raise it")
    if value < bounds.least:
        raise UserError(f"{given} is less than {least}; raise it")
    if value > bounds.most:
        raise UserError(f"{given} is more than {most}; lower it")


def refuse_empty(words: Sequence[str], kind: type[Any] | None = None) -> None:
    """Raise UserError for an empty word, which as a path would mean the current folder.

    Options of the dataclass `kind` that are marked MayBeEmpty are exempt.
    """
    hints = get_type_hints(kind, include_extras=True) if kind else {}
    may_be_empty = {
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
        if not value and option not in may_be_empty:
            where = option if option.startswith("--") else "an argument"
            raise UserError(f"{where} '' is empty; give a value, or leave it out")


def refuse_unwritable(path: Path, option: str, kind: str = "folder") -> None:
    """Raise UserError if a folder, or file, of this name can be neither created nor written."""
    given, path = f"{option} {path}", path.absolute()
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    missing = path.parts[len(nearest.parts) :]
    if nearest.is_symlink() and not nearest.exists():
        raise UserError(f"{given}: {nearest} is a broken link; give another {kind}")
    if missing and not nearest.is_dir():
        raise UserError(f"{given}: {nearest} is a file, not a folder; give another {kind}")
    if not missing and kind == "folder" and not nearest.is_dir():
        raise UserError(f"{given} is a file, not a folder; give another folder")
    if not missing and kind == "file" and nearest.is_dir():
        raise UserError(f"{given} is a folder; give a file")
    if long := next((name for name in missing if len(os.fsencode(name)) > LONGEST), None):
        raise UserError(
            f"{option}: the name {long[:20]}... has {len(os.fsencode(long))} bytes; use at most "
            f"{LONGEST}"
        )
    folder = nearest if nearest.is_dir() else nearest.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{given} cannot be written: {folder}: {error.strerror}; give another {kind}"
        ) from error
