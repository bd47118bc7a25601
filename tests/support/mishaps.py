"""Faults of a decoder (crash, hang, full memory) that tests cause in a sandbox's child.

Imports little, since every child that calls one imports this.
"""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

from PIL import Image

_state = {"poisoned": False}


def same(value: object) -> object:
    """Return the argument."""
    return value


def null_pointer() -> None:
    """Read address 0."""
    ctypes.string_at(0)


def give_up() -> None:
    """End the process the way C libraries do, without a message."""
    os._exit(1)


def hang() -> None:
    """Never return."""
    threading.Event().wait()


def hang_in_c(note: str = "") -> None:
    """Sleep in C without giving the interpreter's lock back: no other Python thread runs.

    Leaves a file called `note` behind, if that is given.
    """
    if note:
        Path(note).touch()
    ctypes.PyDLL(None).sleep(600)


def eat_memory() -> None:
    """Take memory without end."""
    eaten = []
    while True:
        eaten.append(b"x" * 2**24)


def eat_memory_in_c() -> None:
    """Have Pillow ask for 10 GB."""
    Image.new("RGB", (50_000, 50_000))


def poison() -> int:
    """Do what ends the process only at its next call; returns the process."""
    _state["poisoned"] = True
    return os.getpid()


def fragile() -> int:
    """Fine in any process but a poisoned one; returns the process."""
    if _state["poisoned"]:
        os.abort()
    return os.getpid()


def shout() -> str:
    """Print where the answers go, from Python and from below it."""
    print("libtiff: a warning")
    sys.stdout.flush()
    os.write(1, b"libpng: another")
    return "answer"


def unanswerable() -> threading.Lock:
    """Return what cannot be pickled."""
    return threading.Lock()


def meet(mine: Path, other: Path) -> int:
    """Wait until the other call is here too; returns the process."""
    mine.touch()
    while not other.exists():
        time.sleep(0.01)
    return os.getpid()


def modules() -> set[str]:
    """What this process has imported."""
    return set(sys.modules)
