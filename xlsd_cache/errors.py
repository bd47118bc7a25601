"""The exception that a user's mistake raises, and the words of other exceptions."""


class UserError(Exception):
    """A mistake that the user can correct. Its one sentence gives fact, place, value and remedy.

    The command lines catch it, print it and exit non-zero. Any other exception is a bug of ours.
    """


def one_line(error: object, longest: int = 200) -> str:
    """What a library's error says, on one line of at most `longest` characters."""
    return " ".join(str(error).split())[:longest]
