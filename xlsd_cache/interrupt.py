"""Ctrl-C and SIGTERM as a question to the work at hand, not as an exception in its middle."""

import signal
from types import FrameType
from typing import Any


class StopSignal:
    """Within the block the first signal is only noted in `asked`; the second ends the program."""

    def __init__(self) -> None:
        self.asked = 0  # the signal's number, 0 while there was none
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
