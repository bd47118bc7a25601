"""Ctrl-C and SIGTERM as a question to the work at hand, not as an exception in its middle."""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

STOPPING = "xlsd-cache: stopping after the batch at hand; a second Ctrl-C stops at once, without it"


class StopSignal:
    """Within the block the first signal is only noted in `asked`; the second ends the program.

    With `answer`, the first is answered on stderr at once and the second ends the process where it
    is, whatever its threads are doing: for work that may be killed at any moment.
    """

    def __init__(self, answer: str = "") -> None:
        self.asked = 0  # the signal's number, 0 while there was none
        self._answer = answer
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked and self._answer:
            _tell("xlsd-cache: stopped at once")
            os._exit(128 + number)
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        if self._answer:
            _tell(self._answer)


def _tell(text: str) -> None:
    """A line of its own below a progress bar; not by print, whose buffer may be in use here."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
