"""Checks the words of a command line: what it does not take is one sentence, with a suggestion.

This runs before tyro's parser, whose own errors are long and report a missing option first.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from tyro.conf import Suppress

from xlsd_cache.console.option_checks import POSITIONAL, all_leaves, marks_of, option_of
from xlsd_cache.errors import UserError

MANY = 1 << 30  # words that an option takes
_NUMBERS: dict[type[float], str] = {int: "a whole number", float: "a number"}
OPTION = re.compile(r"--?[A-Za-z]")


def check_command(prog: str, words: Sequence[str], commands: Sequence[str], other: str) -> None:
    """Raise UserError if the first word is not a command, with the nearest command.

    `other` are the commands of the other program, separated by spaces.
    """
    first = words[0] if words else "-"
    if OPTION.match(first) or first == "-" or first in commands:
        return
    if first in other.split():
        theirs = "xlsd-cache" if prog == "xlsd-train" else "xlsd-train"
        raise UserError(f"{first} is a command of the other program: {theirs} {first}")
    raise UserError(
        f"{first!r} is not a command of {prog}{near(first, commands) or ';'} `{prog} --help` lists "
        f"them"
    )


def check_words(words: Sequence[str], kind: type[Any], names: Mapping[str, str]) -> None:
    """Raise UserError for an unknown option, a value of the wrong type, or a word too many.

    `names` are the option names of other programs, without dashes -> our option, or a sentence
    about it.
    """
    _check_quoted(words)
    hints, options = _hints_of(kind), options_of(kind)
    free = most = _positionals(kind)
    for word, following in option_runs(words):
        option, rest = "", following
        if word:
            name, is_, value = word.partition("=")
            option = name if not name.startswith("--") else "--" + name[2:].replace("_", "-")
            if option not in options:
                raise UserError(_unknown(word, options, names))
            if is_ and not options[option]:
                raise UserError(f"{option} takes no value, and {value!r} is given")
            takes = 0 if is_ else options[option]
            if options[option]:
                given = [value] if is_ else following[:takes]
                _check_values(given, option, hints[option], 1 if is_ else takes)
            rest = following[takes:]
            if MANY - len(words) < free < most:  # the parser takes only one row of them
                free = 0
        if len(rest) > free:
            after = f" after {option}, which takes {options[option] or 'no'} word" if option else ""
            more = "s" if option and options[option] > 1 else ""
            raise UserError(
                f"unexpected {rest[free]!r}{after}{more}; quote a name that contains spaces, as in "
                f'"my folder"'
            )
        free -= len(rest)


def option_runs(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option and the words up to the next one; the first run is of no option."""
    runs: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if OPTION.match(word) and word != "--":
            runs.append((word, []))
        else:
            runs[-1][1].append(word)
    return runs


def options_of(kind: type[Any]) -> dict[str, int]:
    """Every option of a command's dataclass -> the most words that it takes."""
    options = {}
    for option, hint in _hints_of(kind).items():
        options[option] = _count(hint)
        if hint is bool:
            options["--no-" + option[2:]] = 0
    return options


def _hints_of(kind: type[Any]) -> dict[str, Any]:
    """Option, or an alias of it -> the type of its field."""
    options: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = marks_of(hint)
        if POSITIONAL not in marks and Suppress not in marks:
            aliases = (alias for mark in marks for alias in getattr(mark, "aliases", None) or ())
            options |= dict.fromkeys((option_of(name, hint), *aliases), hint)
    return options


def _check_values(words: Sequence[str], option: str, hint: Any, takes: int) -> None:
    """Raise UserError for words that are no values of the option's type, or too few."""
    kinds = [kind for kind, _ in all_leaves(hint)]
    if takes < MANY and len(words) < takes and not (NoneType in kinds and words == ["None"]):
        raise UserError(f"{option} needs {f'{takes} values' if takes > 1 else 'a value'}")
    choices = [str(value) for kind in kinds for value in get_args(kind)]
    wanted = [name for kind, name in _NUMBERS.items() if kind in kinds] + choices
    if str in kinds or Path in kinds:
        return  # any word will do
    for word in words:
        if word in choices or (word == "None" and NoneType in kinds):
            continue
        if not any(_parses(kind, word) for kind in _NUMBERS if kind in kinds):
            raise UserError(f"{option} {word!r} is not {' or '.join(wanted)}")


def _parses(kind: type[float], word: str) -> bool:
    try:
        kind(word)
    except ValueError:
        return False
    return True


def near(given: str, right: Sequence[str], least: float = 0.6) -> str:
    """The nearest word as the end of a sentence; empty if none is as near as `least` (0 to 1)."""
    matches = get_close_matches(given, right, 1, least)
    return f"; did you mean {matches[0]}?" if matches else ""


def _unknown(word: str, options: Mapping[str, int], names: Mapping[str, str]) -> str:
    name = word.partition("=")[0]
    plain = name.lstrip("-").replace("_", "-").lower()
    ours = {option.lstrip("-"): f"did you mean {option}?" for option in options}
    theirs = {
        key: f"{key} is called {meant} here" if meant.startswith("--") else f"{key}: {meant}"
        for key, meant in names.items()
        if not meant.startswith("--") or meant.split()[0] in options
    }
    if plain in theirs:
        return name + theirs[plain].removeprefix(plain)
    matches = get_close_matches(plain, [*ours, *theirs], 1, 0.6)
    meant = {**{key: f"--{text}" for key, text in theirs.items()}, **ours}
    return f"there is no option {name}" + (f"; {meant[matches[0]]}" if matches else "")


def _check_quoted(words: Sequence[str]) -> None:
    """Raise UserError where several words together are the name of an existing file or folder."""
    for option, following in option_runs(words):
        row = [option.partition("=")[2], *following] if "=" in option else following
        for first, last in ((a, b) for a in range(len(row)) for b in range(a + 2, len(row) + 1)):
            if last - first > 8 or Path(row[first]).exists():
                continue
            if path := _existing(" ".join(row[first:last])):
                raise UserError(f'the name {path!r} contains spaces; quote it: "{path}"')


def _existing(path: str) -> str:
    """The path, without NAME= or :WEIGHT, if it exists; else an empty text."""
    for each in (path, path.partition("=")[2], path.rpartition(":")[0]):
        try:
            if " " in each and Path(each).expanduser().exists():
                return each
        except (OSError, ValueError, RuntimeError):  # e.g. a name that is too long
            continue
    return ""


def _positionals(kind: type[Any]) -> int:
    hints = get_type_hints(kind, include_extras=True).values()
    return sum(_count(hint) for hint in hints if POSITIONAL in marks_of(hint))


def _count(hint: Any) -> int:
    """The most words that a value of this type takes."""
    if get_origin(hint) is Annotated:
        return _count(get_args(hint)[0])
    if hint is bool:
        return 0
    if get_origin(hint) in {Union, UnionType}:
        return max(map(_count, get_args(hint)))
    if get_origin(hint) is tuple:
        return MANY if get_args(hint)[-1] is Ellipsis else len(get_args(hint))
    return 1
