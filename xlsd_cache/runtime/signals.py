"""Graceful stop on SIGINT, SIGTERM and SIGHUP: a flag to poll instead of an exception.

They come from Ctrl-C (SIGINT); from `kill`, systemd, SLURM or `docker stop` (SIGTERM); from a
closed terminal (SIGHUP). The first is recorded, and the work stops where nothing is lost. A
supervisor may signal one process or all, and repeatedly, so only a second Ctrl-C stops at once.
"""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

STOPPING = "xlsd-cache: stopping after this batch; press Ctrl-C again to stop at once"
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class StopSignal:
    """Records the first stop signal in a `with` block; a second Ctrl-C raises KeyboardInterrupt.

    `answer` is a text printed to stderr at the first signal. With it, and unless `raises`, a second
    Ctrl-C ends the process at once instead, whatever its threads are doing: for work that may be
    killed at any moment.
    """

    def __init__(self, answer: str = "", raises: bool = False) -> None:
        self.asked = 0  # the first signal's number; 0: none yet
        self._typed = False  # Ctrl-C
        self._answer, self._raises = answer, raises or not answer
        self._before: dict[int, Any] = {}

    @property
    def hurries(self) -> bool:
        """Whether a supervisor waits or the terminal is gone: start nothing slow."""
        return self.asked not in {0, signal.SIGINT}

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            # Under nohup SIGHUP is ignored, and stays so.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        typed = number == signal.SIGINT
        if typed and self._typed:
            if self._raises:
                raise KeyboardInterrupt
            _tell("xlsd-cache: stopped at once")
            os._exit(128 + number)
        self._typed |= typed
        if not self.asked:
            self.asked = number
            if self._answer:
                _tell(self._answer)


def _tell(text: str) -> None:
    """Write a line, over a progress bar. Not by print, whose buffer may be in use here."""
    with suppress(OSError):
        over = f"\r{text.ljust(os.get_terminal_size(2).columns - 1)}" if os.isatty(2) else text
        os.write(2, f"{over}\n".encode())
