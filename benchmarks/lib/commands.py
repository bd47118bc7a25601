"""Run our own command lines in this process, with stdout kept for the benchmark's tables."""

import contextlib
import logging
import shlex
import sys
from collections.abc import Callable, Sequence

from xlsd_cache.errors import UserError


class _Lines(logging.Handler):
    """Keeps the logged lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_command(main: Callable[[Sequence[str]], int], *arguments: object) -> list[str]:
    """Run a command and return the lines that it logged; its stdout goes to stderr.

    Raises UserError if its exit status is not 0.
    """
    words, handler = list(map(str, arguments)), _Lines()
    log = logging.getLogger("xlsd")
    log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            if main(words):
                raise UserError(f"{shlex.join(words)} failed; its error is above")
    finally:
        log.removeHandler(handler)
    return handler.lines


def build_time(log: Sequence[str]) -> tuple[float, str]:
    """Seconds from the first decode to the last commit of a build, and the line that says so."""
    (line,) = [line for line in log if line.startswith("time: ")]
    return float(line.split()[1]), line
