"""The words of a command line that it does not take: one sentence, with what was likely meant.

Looked at before the parser, whose own errors are long, and begin with whatever is missing.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from tyro.conf import Suppress

from xlsd_cache.console.option_checks import POSITIONAL, marks_of, option_of
from xlsd_cache.errors import UserError

MANY = 1 << 30  # words that an option takes
OPTION = re.compile(r"--?[A-Za-z]")


def check_command(prog: str, words: Sequence[str], commands: Sequence[str], other: str) -> None:
    """Raise UserError where the first word names no command, with the nearest that there is.

    `other` are the commands of the other program, as a sentence would have them.
    """
    first = words[0] if words else "-"
    if OPTION.match(first) or first == "-" or first in commands:
        return
    if first in other.split():
        theirs = "xlsd-cache" if prog == "xlsd-train" else "xlsd-train"
        raise UserError(f"{first} is a command of the other program: {theirs} {first}")
    raise UserError(
        f"{first!r} is no command of {prog}{near(first, commands) or ';'} `{prog} --help` lists "
        f"them all"
    )


def check_words(words: Sequence[str], kind: type[Any], names: Mapping[str, str]) -> None:
    """Raise UserError for an option that the command does not have, and for words that none takes.

    `names` are those that other programs use: option -> ours, or a sentence about it, both without
    the leading dashes of the name. Words that ask for help are left to the parser.
    """
    if {"-h", "--help"} & set(words):
        return
    _check_quoted(words)
    options = options_of(kind)
    taken, left = "", 0  # the option at hand, and how many more words it takes
    free = most = _positionals(kind)
    for word in words:
        if OPTION.match(word) and word != "--":
            name, is_, _ = word.partition("=")
            known = name if not name.startswith("--") else "--" + name[2:].replace("_", "-")
            if known not in options:
                raise UserError(_unknown(word, options, names))
            taken, left = known, 0 if is_ else options[known]
            if MANY - len(words) < free < most:  # the parser takes only one row of them
                free = 0
        elif left:
            left -= 1
        elif free:
            free -= 1
        else:
            after = f" after {taken}, which takes {options[taken] or 'no'} word" if taken else ""
            more = "s" if taken and options[taken] > 1 else ""
            raise UserError(
                f"unexpected {word!r}{after}{more}; quote a name that holds spaces, as in "
                f'"my folder"'
            )


def options_of(kind: type[Any]) -> dict[str, int]:
    """Every option of a command's dataclass -> how many words it takes at most."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = marks_of(hint)
        if POSITIONAL in marks or Suppress in marks:
            continue
        option = option_of(name, hint)
        aliases = (alias for mark in marks for alias in getattr(mark, "aliases", None) or ())
        for each in (option, *aliases):
            found[each] = _count(hint)
        if hint is bool:
            found["--no-" + option[2:]] = 0
    return found


def near(given: str, right: Sequence[str], least: float = 0.6) -> str:
    """What was likely meant, as the end of a sentence; empty where nothing is so near, 0 to 1."""
    found = get_close_matches(given, right, 1, least)
    return f"; did you mean {found[0]}?" if found else ""


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
    found = get_close_matches(plain, [*ours, *theirs], 1, 0.6)
    meant = {**{key: f"--{told}" for key, told in theirs.items()}, **ours}
    return f"there is no option {name}" + (f"; {meant[found[0]]}" if found else "")


def _check_quoted(words: Sequence[str]) -> None:
    """Raise UserError where words in a row are together the name of something that is there."""
    rows: list[list[str]] = [[]]
    for word in words:
        if OPTION.match(word):
            rows.append([word.partition("=")[2]] if "=" in word else [])
        else:
            rows[-1].append(word)
    for row in rows:
        for at, last in ((a, b) for a in range(len(row)) for b in range(a + 2, len(row) + 1)):
            if last - at > 8 or Path(row[at]).exists():
                continue
            if there := _there(" ".join(row[at:last])):
                raise UserError(f'the name {there!r} holds spaces; quote it: "{there}"')


def _there(path: str) -> str:
    """The path, or what of it follows NAME= or precedes :WEIGHT, where that exists; else empty."""
    for each in (path, path.partition("=")[2], path.rpartition(":")[0]):
        try:
            if " " in each and Path(each).expanduser().exists():
                return each
        except (OSError, ValueError, RuntimeError):  # a name that is too long, say
            continue
    return ""


def _positionals(kind: type[Any]) -> int:
    hints = get_type_hints(kind, include_extras=True).values()
    return sum(_count(hint) for hint in hints if POSITIONAL in marks_of(hint))


def _count(hint: Any) -> int:
    """How many words a value of this type takes at most."""
    if get_origin(hint) is Annotated:
        return _count(get_args(hint)[0])
    if hint is bool:
        return 0
    if get_origin(hint) in {Union, UnionType}:
        return max(map(_count, get_args(hint)))
    if get_origin(hint) is tuple:
        return MANY if get_args(hint)[-1] is Ellipsis else len(get_args(hint))
    return 1
