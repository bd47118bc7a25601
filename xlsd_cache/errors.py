"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake that the user can correct. Its one sentence gives fact, place, value and remedy.

    The command lines catch it, print it and exit non-zero. Any other exception is a bug of ours.
    """
