"""Text for the terminal: whatever names hold, whatever the terminal can show, and when it is gone.

A command never fails because of where its text goes. What an encoding lacks is written escaped.
Once stdout cannot be written, a command that makes something goes on without it, and one that
only prints ends by SIGPIPE, as `cat` does.
"""

import errno
import io
import json
import locale
import logging
import os
import re
import select
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xlsd_cache.errors import UserError

# Control characters, what turns the direction of writing or is not seen, and lone surrogates. The
# two joiners stay: words of several scripts and many emoji need them.
_UNSAFE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\\ud800-\\udfff\U000e0000-\U000e007f]"
)

# What else than _UNSAFE a program may write: line ends, tabs, and colours, as help and bars have.
_RAW = re.compile(r"\x1b\[[0-9;]*[mAK]|(?![\t\n\r])" + _UNSAFE.pattern)


def shown(text: object) -> str:
    """The text with control characters, line ends among them, as escapes: one harmless line."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(text: object = "", end: str = "\n") -> None:
    """Print a line that may hold names, captions or paths."""
    print(shown(text), end=end)


class LogHandler(logging.Handler):
    """Writes log records to stderr, a line each, above the progress bars that are on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; warnings and errors start with their level."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        line = level + shown(record.getMessage())
        if tqdm := sys.modules.get("tqdm"):  # nothing shows a bar where it is not loaded
            tqdm.tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)


@contextmanager
def as_command_line() -> Iterator[None]:
    """The library's log, from INFO on, goes to stderr, and errors name flags, not arguments."""
    named, UserError.names_flags = UserError.names_flags, True
    log, handler = logging.getLogger("xlsd"), LogHandler()
    level, propagates = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # other libraries may have given the root logger a handler
    try:
        yield
    finally:
        log.removeHandler(handler)
        UserError.names_flags = named
        log.setLevel(level)
        log.propagate = propagates


def _tell(text: object) -> None:
    """Print a line to stderr: how the command ended."""
    print(shown(text), file=sys.stderr)


def say_json(value: Any) -> None:
    """Print JSON that parses in every encoding of stdout: what cannot be shown is escaped in it."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    # Line ends are JSON's own: those within a text are escaped already.
    print(_UNSAFE.sub(lambda it: it[0] if it[0] == "\n" else json.dumps(it[0])[1:-1], text))


class _Text(io.TextIOWrapper):
    """Text of whoever writes it, libraries too: nothing of it does more to a terminal than colour.

    What of ours may hold names is escaped by `say` and the log handler already.
    """

    def write(self, text: str) -> int:
        """Write it; returns how much of it that is: all."""
        super().write(_RAW.sub(_tamed, text))
        return len(text)


def _tamed(found: re.Match[str]) -> str:
    if not found[0].startswith("\x1b["):
        return shown(found[0])
    return "" if found[0].endswith("m") and os.environ.get("NO_COLOR") else found[0]


def bold(text: str) -> str:
    """The text in bold where stdout is a terminal that can show it, and NO_COLOR is not set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in {None, "", "dumb"}
    return text if plain or not sys.stdout.isatty() else f"\x1b[1m{text}\x1b[0m"


class _Stream(io.RawIOBase):
    """A file descriptor to write to that is given up, not complained of, once it refuses."""

    def __init__(self, number: int, name: str, lasting: bool) -> None:
        self.number, self.name, self.lasting = number, name, lasting
        self.refused: OSError | None = None

    def write(self, data: Any) -> int:
        """Write some of it. Raises BrokenPipeError once, where that is to end the command."""
        if self.refused:
            return len(data)
        try:
            return os.write(self.number, data)
        except BlockingIOError:  # another program shares the pipe and wants it so
            select.select([], [self.number], [])
            return 0
        except OSError as error:
            self.refused = error
            if isinstance(error, BrokenPipeError) and not self.lasting:
                raise
            return len(data)

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor, for those that ask how wide the terminal is."""
        return self.number

    def isatty(self) -> bool:
        """Whether a person looks on."""
        return os.isatty(self.number)


_streams: list[_Stream] = []  # of a program: stdout, stderr


def start() -> None:
    """Prepare to be a program of its own: UTF-8 for names, and streams that outlive the terminal.

    Under a locale of another encoding the program begins again in Python's UTF-8 mode: names are
    bytes on POSIX, and the same files must give the same store in every locale.
    """
    if os.name == "posix" and sys.getfilesystemencoding() != "utf-8":
        _begin_again()
    for number in range(3):  # a file opened as number 1 or 2 would get what libraries print
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # children suffer from it too
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if os.name == "posix" and stream is getattr(sys, f"__{name}__"):
            _streams.append(_Stream(number, f"<{name}>", lasting=number == 2))
            replaced = _Text(
                io.BufferedWriter(_streams[-1]),
                encoding=getattr(stream, "encoding", "utf-8"),
                errors="backslashreplace",
                line_buffering=getattr(stream, "line_buffering", True),
                write_through=getattr(stream, "write_through", False),
            )
            setattr(sys, name, replaced)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        elif stream is None:  # Windows, without a console
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def _begin_again() -> None:
    """The same process under UTF-8 mode, as its children then are too; once is enough.

    Text for the terminal stays in the encoding that the terminal expects.
    """
    if os.environ.get("PYTHONUTF8") == "1":  # Python was told not to listen
        return
    os.environ["PYTHONUTF8"] = "1"
    encoding = getattr(sys.stdout, "encoding", None) or locale.getencoding()
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - ourselves


def go_on_alone() -> None:
    """From here on a reader that leaves does not end the command: it makes more than text."""
    for stream in _streams:
        stream.lasting = True


def run(name: str, command: Callable[[], int], stopped: str = "stopped at once") -> int:
    """Run a command of the program NAME; returns its exit code. A user's mistake is one sentence.

    And so is what the system refuses of a path: a name too long, a folder that may not be read.
    Where stdout cannot be written, for a full disk say, the code is not 0.
    """
    try:
        try:
            with as_command_line():
                code = _code_of(name, command, stopped)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _refused(errno.EPIPE):  # some other pipe's, and our own fault
            raise
        _end_by_sigpipe()
        return 1
    except SystemExit:  # after a help text, or for words that are no command line
        if not _say_refused(name):
            raise
        return 1
    return code or int(_say_refused(name))


def _code_of(name: str, command: Callable[[], int], stopped: str) -> int:
    """The exit code of a command, whose mistakes are told."""
    try:
        return command()
    except UserError as error:
        _tell(f"{name}: {error}")
        return 1
    except OSError as error:
        if error.filename is None or isinstance(error, BrokenPipeError):
            raise
        told = f"{error.strerror}; mend that, or name another path"
        _tell(f"{name}: cannot go on: {error.filename}: {told}")
        return 1
    except KeyboardInterrupt:
        _tell(f"{name}: {stopped}")
        return 130


def _refused(*numbers: int) -> bool:
    return any(it.refused and it.refused.errno in numbers for it in _streams[:1])


def _say_refused(name: str) -> bool:
    """Say that stdout could not be written, if so. A reader that has left knows it."""
    error = _streams[0].refused if _streams else None
    if error is None or error.errno == errno.EPIPE:
        return False
    if error.errno == errno.EIO and stat.S_ISCHR(os.fstat(1).st_mode):  # a terminal that closed
        return False
    _tell(f"{name}: cannot write to stdout: {error.strerror}")
    return True


def _end_by_sigpipe() -> None:
    """What a shell sees of any program whose reader has left."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
