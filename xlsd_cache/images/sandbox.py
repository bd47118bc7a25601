"""Functions called in child processes: what kills, blocks or bloats one costs a call, not the run.

Decoders are C code fed with files from anywhere. A child imports what the function needs, never
torch; it takes the end of its pipe for the end of its parent; and the memory limit and the
watchdog hit nobody but it.
"""

import atexit
import faulthandler
import functools
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar, TypeVarTuple

import psutil

from xlsd_cache.errors import UserError
from xlsd_cache.images.decode import MAX_PIXELS
from xlsd_cache.outcomes import FAILURES, Rejected
from xlsd_cache.runtime.signals import SIGNALS

SECONDS = 120.0  # QOI, in plain Python, takes that long for an image of MAX_PIXELS
NBYTES = 3 * 2**30  # what every format needs for it
Args = TypeVarTuple("Args")
Result = TypeVar("Result")


class Guard:
    """Calls module-level functions in `children` processes, which any number of threads share.

    A call may take `seconds` and, where the system knows such a limit (Linux), `nbytes` of memory.
    A child starts with its first call. A call that fails in a child with a past is repeated in a
    fresh one, so that no file is refused for what another did to the process before it.
    """

    def __init__(self, seconds: float, nbytes: int, children: int = 1) -> None:
        self._children = [_Child(seconds, nbytes) for _ in range(children)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def call(self, function: Callable[[*Args], Result], *args: *Args) -> Result | Rejected:
        """What `function(*args)` returns, or Rejected with one of FAILURES.

        Raises what the function raises. Waits while every child is busy.
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

    def close(self) -> None:
        """End every child after the call it is at. A later call would start one again."""
        for child in [self._idle.get() for _ in self._children]:
            child.stop()
            self._idle.put(child)

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Child:
    """One process, or none at the moment."""

    def __init__(self, seconds: float, nbytes: int) -> None:
        self._seconds, self._nbytes = seconds, nbytes
        self._process: subprocess.Popen[bytes] | None = None
        self._answered = 0  # calls of this process

    def call(self, message: bytes) -> tuple[bool, Any]:
        """(True, what the function returned or a Rejected), or (False, what it raised)."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        answer = self._attempt(message)
        if _failed(answer) and self._answered:
            self._start()
            answer = self._attempt(message)
        self._answered += 1
        if _failed(answer):
            self.stop()  # where memory ran out, who knows what else is broken
        return answer

    def stop(self) -> None:
        """End the process at once, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # bytes that the dead process did not take
                pipe.close()

    def _start(self) -> None:
        """Start a process that answers; a second time where the first dies, by no call's fault."""
        for _ in range(2):
            self._spawn()
            if not _failed(self._attempt(pickle.dumps((os.getpid, ())))):
                return
        self.stop()
        raise UserError(
            f"no process to decode images in could be started with {sys.executable}; what it "
            f"printed above says why: mend that"
        )

    def _spawn(self) -> None:
        self.stop()
        code = "from xlsd_cache.images.sandbox import serve; serve()"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OPENBLAS_NUM_THREADS": "1",  # each thread of numpy's would reserve memory
        }
        with _blocked_signals():
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                # -P: modules come from our own path, not from the folder that the user is in
                [sys.executable, "-P", "-c", code, str(self._seconds), str(self._nbytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                # Ctrl-C goes to the terminal's whole group, and is for us to act on.
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
            _write(self._process.stdin, message)
            answer = _read(self._process.stdout)
        except (EOFError, OSError):  # the process is gone
            code = self._process.wait()
        except BaseException:  # the answer, when it comes, would be taken for the next call's
            self.stop()
            raise
        else:
            return pickle.loads(answer)  # type: ignore[no-any-return]  # noqa: S301 - our child's
        # The watchdog exits with 1; so do C libraries that give up, but not after that long.
        if code == 1 and time.monotonic() - begun >= self._seconds:
            return True, Rejected("decoder_hung", f"no end after {self._seconds:g} seconds")
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return True, Rejected("decoder_crashed", name)


def decode_nbytes(max_pixels: int) -> int:
    """What decoding one image of that many pixels may take of memory."""
    return int(NBYTES * max(1.0, max_pixels / MAX_PIXELS))


@functools.cache
def decoders(children: int, max_pixels: int = MAX_PIXELS) -> Guard:
    """The guard that decodes images: one for these arguments and process, until that ends."""
    seconds = SECONDS * max(1.0, max_pixels / MAX_PIXELS)
    guard = Guard(seconds, decode_nbytes(max_pixels), children)
    atexit.register(guard.close)
    return guard


def _failed(answer: tuple[bool, Any]) -> bool:
    return isinstance(answer[1], Rejected) and answer[1].reason in FAILURES


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """A child begun here is deaf to what asks programs to end, before it can say so itself.

    systemd and SLURM signal all processes at once: an image is not refused for that.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve() -> None:
    """Be a child: answer the calls that come from stdin, one by one, until it ends."""
    for number in SIGNALS:  # its end is its parent's, which finishes the batch first
        signal.signal(number, signal.SIG_IGN)
    seconds, nbytes = float(sys.argv[1]), int(sys.argv[2])
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    _limit_memory(nbytes)
    with (
        Path(os.devnull).open("w") as nowhere,
        suppress(EOFError, BrokenPipeError),  # the parent's end
    ):
        for stream in (1, 2):  # what libraries print is no part of an answer, and names no file
            os.dup2(nowhere.fileno(), stream)
        while True:
            message = _read(calls)
            # A C thread that exits the process: also where C code hangs and holds the GIL, and
            # also when the parent was killed meanwhile and nobody waits.
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            answer = _answer(message)
            faulthandler.cancel_dump_traceback_later()
            _write(answers, answer)


def _answer(message: bytes) -> bytes:
    try:
        function, args = pickle.loads(message)  # noqa: S301 - from our own parent
        return pickle.dumps((True, function(*args)), 5)
    except MemoryError:
        return pickle.dumps((True, Rejected("too_much_memory", "decoding it ran out of memory")), 5)
    except Exception as error:
        return pickle.dumps((False, error), 5)


def _limit_memory(nbytes: int) -> None:
    """Let this process take no more than `nbytes` beyond what it has, where that can be told."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is counted, not dumped into a file
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + nbytes
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    with suppress(OSError, ValueError):  # macOS knows the limit's name and little else
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _write(pipe: IO[bytes], message: bytes) -> None:
    """The length of a pickle, then the pickle. Raises OSError when nobody reads.

    multiprocessing's Connection would do it for these pipes on POSIX, and for none on Windows.
    """
    pipe.write(struct.pack("<Q", len(message)))
    pipe.write(message)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    """What `_write` wrote. Raises EOFError when the process that writes has ended."""
    head = pipe.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 1
    message = pipe.read(length)
    if len(message) < length:
        raise EOFError("the other process has ended")
    return message
