"""A run that goes on: the lines that its terminal shows, and the address of its live page."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.lib.terminal import start
from xlsd_cache.errors import UserError
from xlsd_train.runs.layout import samples_of

COLUMNS = 112
TRAINS = re.compile("training.*step")
OURS = [sys.executable, "-m", "xlsd_train"]


class Terminal:
    """Runs a command of xlsd-train in a terminal, and reads what it writes."""

    def __init__(self, words: Sequence[str]) -> None:
        self.process, self._outer = start([*OURS, *words], COLUMNS)
        self._read = b""
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        with suppress(OSError):  # the terminal's other end is closed
            while block := os.read(self._outer, 1 << 16):
                self._read += block

    def lines(self) -> list[str]:
        """What the terminal shows: text after a carriage return covers the text before it."""
        shown = []
        for line in self._read.decode(errors="ignore").replace("\r\n", "\n").split("\n"):
            covered = ""
            for text in line.split("\r"):
                covered = text + covered[len(text) :]
            starts = range(0, max(1, len(covered.rstrip())), COLUMNS)
            shown += [covered[start : start + COLUMNS].rstrip() for start in starts]
        return shown

    def kill(self) -> None:
        """End the command and all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def going(words: Sequence[str], run: Path, step: int) -> Iterator[tuple[list[str], str]]:
    """The terminal's lines and the address of the live page, once samples of `step` are drawn.

    The run goes on while the block runs, and is killed at its end.
    """
    terminal = Terminal([*words, "--out", str(run)])
    try:
        lines = [""]
        while terminal.process.poll() is None and not (
            samples_of(run, step).exists() and TRAINS.match(lines[-1])
        ):
            time.sleep(0.1)
            lines = terminal.lines()
        if code := terminal.process.returncode:
            raise UserError(f"the run ended with code {code}: {lines[-3:]}")
        command = [*OURS, "live", str(run), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            try:
                yield lines, server.stdout.readline().strip()
            finally:
                server.send_signal(signal.SIGINT)
    finally:
        terminal.kill()
