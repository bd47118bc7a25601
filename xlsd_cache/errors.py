"""The exception that a user's mistake raises, and other exceptions' text on one line."""

import re
from typing import ClassVar

_FLAG = re.compile(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)")


class UserError(Exception):
    """A mistake that the user can correct. Its one sentence gives fact, place, value and remedy.

    The command lines catch it, print it and exit non-zero. Any other exception is a bug of ours.
    Messages are written with the command lines' flags. Elsewhere, as in a notebook, the text names
    arguments: `max_ratio` for --max-ratio, except between backquotes.
    """

    names_flags: ClassVar[bool] = False  # a command line sets it while it runs

    def __str__(self) -> str:
        """The sentence."""
        text = super().__str__()
        if self.names_flags:
            return text
        pieces = text.split("`")  # every second one is a command line to type
        pieces[::2] = [_FLAG.sub(lambda it: it[1].replace("-", "_"), it) for it in pieces[::2]]
        return "`".join(pieces)


class Stopped(UserError):
    """The user has stopped the work; the sentence says how to continue."""


def one_line(error: object, longest: int = 200) -> str:
    """What a library's error says, on one line of at most `longest` characters."""
    return " ".join(str(error).split())[:longest]
