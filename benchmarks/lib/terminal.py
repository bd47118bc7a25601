"""Starts a command in a real terminal."""

import fcntl
import os
import struct
import subprocess
import termios
from collections.abc import Sequence


def start(
    command: Sequence[str], columns: int, rows: int = 24
) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and the descriptor from which to read what it writes."""
    outer, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
    )
    os.close(inner)
    return process, outer
