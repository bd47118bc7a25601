"""The child process of a sandbox: answers calls from its parent, with limits of time and memory.

It imports only what the function needs, never torch, and exits when its pipe closes, as it does
when the parent dies.
"""

import faulthandler
import os
import pickle
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

import xlsd_cache.images.decode  # noqa: F401 - before memory is limited: it needs some itself
from xlsd_cache.outcomes import Rejected
from xlsd_cache.runtime.signals import SIGNALS


def serve() -> None:
    """The child's main loop: answer the calls that arrive on stdin until it closes."""
    for number in SIGNALS:  # the parent finishes the batch, then ends its children
        signal.signal(number, signal.SIG_IGN)
    seconds, nbytes = float(sys.argv[1]), int(sys.argv[2])
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    limit_memory(nbytes)
    with (
        Path(os.devnull).open("w") as nowhere,
        suppress(EOFError, BrokenPipeError),  # the parent has ended
    ):
        for stream in (1, 2):  # libraries must not print into the answers
            os.dup2(nowhere.fileno(), stream)
        while True:
            message = read(calls)
            # A C thread that exits the process even if C code hangs and holds the GIL, or the
            # parent was killed meanwhile.
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            answer = _answer(message)
            faulthandler.cancel_dump_traceback_later()
            write(answers, answer)


def _answer(message: bytes) -> bytes:
    try:
        function, args = pickle.loads(message)  # noqa: S301 - from our own parent
        return pickle.dumps((True, function(*args)), 5)
    except MemoryError:
        return pickle.dumps((True, Rejected("too_much_memory", "decoding it ran out of memory")), 5)
    except Exception as error:
        return pickle.dumps((False, error), 5)


def limit_memory(nbytes: int) -> None:
    """Limit this process to `nbytes` of memory beyond what it has, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dumps
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + nbytes
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    with suppress(OSError, ValueError):  # macOS has the limit but does not support it
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def write(pipe: IO[bytes], message: bytes) -> None:
    """The length of a pickle, then the pickle. Raises OSError when nobody reads.

    multiprocessing's Connection would do it for these pipes on POSIX, and for none on Windows.
    """
    pipe.write(struct.pack("<Q", len(message)))
    pipe.write(message)
    pipe.flush()


def read(pipe: IO[bytes]) -> bytes:
    """What `write` wrote. Raises EOFError when the process that writes has ended."""
    head = pipe.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 1
    message = pipe.read(length)
    if len(message) < length:
        raise EOFError("the other process has ended")
    return message
