"""Signals that ask a program to end, as a question to the work at hand and not as an exception.

Ctrl-C (SIGINT); `kill`, systemd, SLURM, `docker stop` (SIGTERM); a terminal that closes (SIGHUP).
The first is noted, and the work ends where it loses nothing. They come to one process or to all,
once or again and again: a supervisor repeats what a launcher hands on. Only a person who types
Ctrl-C twice wants the end at once.
"""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

STOPPING = "xlsd-cache: stopping after the batch at hand; a second Ctrl-C stops at once, without it"
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class StopSignal:
    """Within the block the first signal is only noted in `asked`; a second Ctrl-C ends the program.

    With `answer`, the first is answered on stderr at once and the second Ctrl-C ends the process
    where it is, whatever its threads are doing: for work that may be killed at any moment.
    """

    def __init__(self, answer: str = "") -> None:
        self.asked = 0  # the first signal's number, 0 while there was none
        self._typed = False  # Ctrl-C
        self._answer = answer
        self._before: dict[int, Any] = {}

    @property
    def hurries(self) -> bool:
        """Whether a supervisor waits, or nobody is left to read: nothing slow is to be begun."""
        return self.asked not in {0, signal.SIGINT}

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            # nohup has SIGHUP ignored, and so it stays.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        typed = number == signal.SIGINT
        if typed and self._typed:
            if self._answer:
                _tell("xlsd-cache: stopped at once")
                os._exit(128 + number)
            raise KeyboardInterrupt
        self._typed |= typed
        if not self.asked:
            self.asked = number
            if self._answer:
                _tell(self._answer)


def _tell(text: str) -> None:
    """A line of its own below a progress bar; not by print, whose buffer may be in use here."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
