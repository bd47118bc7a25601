"""Calls functions in child processes with limits of time and memory.

Decoders are C code that reads untrusted files: a crash, a hang or a memory bomb must fail one call
and not the run.
"""

import atexit
import functools
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, TypeVar, TypeVarTuple

import psutil

from xlsd_cache.errors import UserError
from xlsd_cache.images.child import read, write
from xlsd_cache.images.header import MAX_PIXELS
from xlsd_cache.outcomes import FAILURES, Rejected
from xlsd_cache.runtime.signals import SIGNALS

log = logging.getLogger("xlsd.cache.images")
SECONDS = 120.0  # QOI, in plain Python, takes that long for an image of MAX_PIXELS
NBYTES = 3 * 2**30  # what every format needs for it
Args = TypeVarTuple("Args")
Result = TypeVar("Result")


class Sandbox:
    """Calls module-level functions in `children` processes, shared by any number of threads.

    A call may take `seconds` and, on Linux, `nbytes` of memory. A child starts with its first call.
    A call that fails in a child that has served others is repeated in a fresh one, so that no file
    is rejected for what an earlier one did to the process.
    """

    def __init__(self, seconds: float, nbytes: int, children: int = 1) -> None:
        self._children = [_Child(seconds, nbytes) for _ in range(children)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def call(self, function: Callable[[*Args], Result], *args: *Args) -> Result | Rejected:
        """Return `function(*args)`, or Rejected with a reason of outcomes.FAILURES.

        Raises what the function raises. Blocks while every child is busy.
        """
        message = pickle.dumps((function, args), 5)
        child = self._idle.get()
        try:
            returned, value = child.call(message)
        finally:
            self._idle.put(child)
        if not returned:
            raise value
        return value  # type: ignore[no-any-return]

    def start(self, most: int) -> None:
        """Start up to `most` children in the background, so that the first calls do not wait."""
        for _ in self._children[:most]:
            Thread(target=self._start_one).start()

    def _start_one(self) -> None:
        with suppress(UserError, OSError):  # a call will raise it again
            self.call(os.getpid)

    def close(self) -> None:
        """End every child after its current call. A later call starts one again."""
        for child in [self._idle.get() for _ in self._children]:
            child.stop()
            self._idle.put(child)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Child:
    """One child process, started when needed."""

    def __init__(self, seconds: float, nbytes: int) -> None:
        self._seconds, self._nbytes = seconds, nbytes
        self._process: subprocess.Popen[bytes] | None = None
        self._answered = 0  # calls of this process

    def call(self, message: bytes) -> tuple[bool, Any]:
        """(True, the return value or a Rejected), or (False, the exception raised)."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        answer = self._attempt(message)
        if _failed(answer) and self._answered:
            self._start()
            answer = self._attempt(message)
        self._answered += 1
        if _failed(answer):
            self.stop()  # after running out of memory, its state is unknown
        return answer

    def stop(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # bytes that the process did not read
                pipe.close()

    def _start(self) -> None:
        """Start a process and check that it answers; tries twice."""
        for _ in range(2):
            self._spawn()
            if not _failed(self._attempt(pickle.dumps((os.getpid, ())))):
                return
        self.stop()
        raise UserError(
            f"cannot start a process to decode images with {sys.executable}; fix the error that it "
            f"printed above"
        )

    def _spawn(self) -> None:
        self.stop()
        code = "from xlsd_cache.images.child import serve; serve()"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OPENBLAS_NUM_THREADS": "1",  # each thread of numpy reserves memory
        }
        with _blocked_signals():
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                # -P: import from our own path, not from the current folder
                [sys.executable, "-P", "-c", code, str(self._seconds), str(self._nbytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                # Ctrl-C is sent to the terminal's process group; only the parent acts on it.
                process_group=0 if os.name == "posix" else None,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self._answered = 0

    def _attempt(self, message: bytes) -> tuple[bool, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        begun = time.monotonic()
        try:
            write(self._process.stdin, message)
            answer = read(self._process.stdout)
        except (EOFError, OSError):  # the process has ended
            code = self._process.wait()
        except BaseException:  # a late answer would be taken for the next call's
            self.stop()
            raise
        else:
            return pickle.loads(answer)  # type: ignore[no-any-return]  # noqa: S301 - our child's
        # The watchdog exits with 1, as do C libraries that give up, but earlier.
        if code == 1 and time.monotonic() - begun >= self._seconds:
            return True, Rejected("decoder_hung", f"no end after {self._seconds:g} seconds")
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return True, Rejected("decoder_crashed", name)


def decode_nbytes(max_pixels: int) -> int:
    """The memory limit for decoding one image of that many pixels."""
    return int(NBYTES * max(1.0, max_pixels / MAX_PIXELS))


@functools.cache
def check_memory(max_pixels: int, workers: int) -> None:
    """Log, once, the memory for decoding above the default limit.

    Raises UserError if not even one such image can be decoded on this machine.
    """
    if max_pixels <= MAX_PIXELS:
        return
    one = decode_nbytes(max_pixels) / 2**30
    there = psutil.virtual_memory().total / 2**30
    fitting = int(there / one)
    if not fitting:
        raise UserError(
            f"--max-megapixels {max_pixels / 1e6:g}: decoding one such image may take "
            f"{one:.1f} GiB, and this machine has {there:.1f} GiB; lower it"
        )
    log.info(
        f"images of up to {max_pixels / 1e6:g} megapixels: decoding one may take {one:.1f} "
        f"GiB, {workers} at once {workers * one:.1f} GiB of this machine's {there:.1f} GiB"
    )
    if workers > fitting:
        log.warning(f"{workers} such images do not fit in memory; --workers {fitting} is safe")


@functools.cache
def decoders(children: int, max_pixels: int = MAX_PIXELS) -> Sandbox:
    """The sandbox that decodes images, one per process and arguments."""
    seconds = SECONDS * max(1.0, max_pixels / MAX_PIXELS)
    sandbox = Sandbox(seconds, decode_nbytes(max_pixels), children)
    atexit.register(sandbox.close)
    return sandbox


def _failed(answer: tuple[bool, Any]) -> bool:
    return isinstance(answer[1], Rejected) and answer[1].reason in FAILURES


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block stop signals, so that a child started here ignores them from its first moment.

    systemd and SLURM signal all processes at once, and no image must be rejected for that.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
