"""Prints and logs text safely: hostile names, limited encodings, closed terminals and pipes.

A command never fails because of where its text goes. Characters that the encoding lacks are
escaped. If stdout cannot be written, a command that makes something continues without it, and one
that only prints ends by SIGPIPE, as `cat` does.
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

from xlsd_cache.console.progress import choose, draws_bars, event
from xlsd_cache.errors import Stopped, UserError

# Control characters, bidirectional and invisible characters, lone surrogates. The two joiners are
# allowed: several scripts and many emoji need them.
_UNSAFE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\\ud800-\\udfff\U000e0000-\U000e007f]"
)

# Line ends, tabs, and the escape sequences of colours and progress bars are allowed.
_RAW = re.compile(r"\x1b\[[0-9;]*[mAK]|(?![\t\n\r])" + _UNSAFE.pattern)


def shown(text: object) -> str:
    """The text on one harmless line: control characters and line ends are escaped."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def say(text: object = "", end: str = "\n") -> None:
    """Print a line that may contain names, captions or paths."""
    print(shown(text), end=end)


class LogHandler(logging.Handler):
    """Writes log records to stderr, a line each, above any progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; warnings and errors start with their level."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        line = level + shown(record.getMessage())
        tqdm = sys.modules.get("tqdm")  # nothing shows a bar where it is not loaded
        if tqdm and draws_bars():
            tqdm.tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)


@contextmanager
def as_command_line() -> Iterator[None]:
    """Show the log on stderr, from level INFO; errors give flags instead of arguments."""
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
        choose()
        log.setLevel(level)
        log.propagate = propagates


def _tell(text: object) -> None:
    """Print to stderr how the command ended."""
    print(shown(text), file=sys.stderr)


def say_json(value: Any) -> None:
    """Print JSON that parses in every encoding of stdout; unsafe characters are escaped."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    # Line ends here are JSON's own: those within texts are escaped already.
    print(_UNSAFE.sub(lambda it: it[0] if it[0] == "\n" else json.dumps(it[0])[1:-1], text))


class _Text(io.TextIOWrapper):
    """A text stream that escapes what could harm a terminal, also if a library writes it."""

    def write(self, text: str) -> int:
        """Write the text; returns its length."""
        super().write(_RAW.sub(_harmless, text))
        return len(text)


def _harmless(match: re.Match[str]) -> str:
    if not match[0].startswith("\x1b["):
        return shown(match[0])
    return "" if match[0].endswith("m") and os.environ.get("NO_COLOR") else match[0]


def bold(text: str) -> str:
    """The text in bold if stdout is a terminal that can show it and NO_COLOR is not set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in {None, "", "dumb"}
    return text if plain or not sys.stdout.isatty() else f"\x1b[1m{text}\x1b[0m"


class _Stream(io.RawIOBase):
    """A file descriptor to write to. After the first error, further text is dropped."""

    def __init__(self, number: int, name: str, ignores_closed_pipe: bool) -> None:
        self.number, self.name = number, name
        self.ignores_closed_pipe = ignores_closed_pipe
        self.refused: OSError | None = None

    def write(self, data: Any) -> int:
        """Write some of the data. Raises BrokenPipeError once, if that is to end the command."""
        if self.refused:
            return len(data)
        try:
            return os.write(self.number, data)
        except BlockingIOError:  # another program has made the shared pipe non-blocking
            select.select([], [self.number], [])
            return 0
        except OSError as error:
            self.refused = error
            if isinstance(error, BrokenPipeError) and not self.ignores_closed_pipe:
                raise
            return len(data)

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The descriptor, by which libraries ask for the terminal's width."""
        return self.number

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self.number)


_streams: list[_Stream] = []  # of a program: stdout, stderr


def start() -> None:
    """Prepare the process of a command line: UTF-8 file names, streams that never raise.

    In a locale with another encoding, the process restarts in Python's UTF-8 mode: file names are
    bytes on POSIX, and the same files must give the same store in every locale.
    """
    if os.name == "posix" and sys.getfilesystemencoding() != "utf-8":
        _restart_in_utf8()
    for number in range(3):  # a file opened as number 1 or 2 would get what libraries print
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # for child processes too
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if os.name == "posix" and stream is getattr(sys, f"__{name}__"):
            _streams.append(_Stream(number, f"<{name}>", ignores_closed_pipe=number == 2))
            replaced = _Text(
                io.BufferedWriter(_streams[-1]),
                encoding=getattr(stream, "encoding", "utf-8"),
                errors="backslashreplace",
                # Python's unbuffered mode (PYTHONUNBUFFERED) has write_through instead.
                line_buffering=getattr(stream, "line_buffering", True)
                or getattr(stream, "write_through", False),
            )
            setattr(sys, name, replaced)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        elif stream is None:  # Windows, without a console
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def _restart_in_utf8() -> None:
    """Restart this process, once, in UTF-8 mode, which its children inherit.

    The terminal's text stays in the terminal's encoding.
    """
    if os.environ.get("PYTHONUTF8") == "1":  # Python ignores the variable, e.g. with -E
        return
    os.environ["PYTHONUTF8"] = "1"
    encoding = getattr(sys.stdout, "encoding", None) or locale.getencoding()
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - ourselves


def ignore_closed_pipe() -> None:
    """Let the command continue if stdout's reader exits: it makes more than text."""
    for stream in _streams:
        stream.ignores_closed_pipe = True


def run(name: str, command: Callable[[], int], stopped: str = "stopped at once") -> int:
    """Run a command of the program `name`; returns its exit code.

    A user's mistake, and a path that the system refuses, is printed as one sentence. If stdout
    cannot be written, e.g. on a full disk, the code is not 0.
    """
    try:
        try:
            with as_command_line():
                code = _code_of(name, command, stopped)
        finally:
            _end_by_ctrl_c()
            sys.stdout.flush()
    except BrokenPipeError:
        if not _refused(errno.EPIPE):  # of another pipe: a bug
            raise
        _end_by_sigpipe()
        return 1
    except SystemExit:  # the parser's, for words that it does not take
        if not _say_refused(name):
            raise
        return 1
    return code or int(_say_refused(name))


def _code_of(name: str, command: Callable[[], int], stopped: str) -> int:
    """The exit code of a command, whose mistakes are told."""
    try:
        return command()
    except UserError as error:
        event("stopped" if isinstance(error, Stopped) else "failed", error=str(error))
        _tell(f"{name}: {error}")
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "xlsd").partition(".")[0]
        if package.startswith("xlsd"):  # ours: a bug
            raise
        _tell(f"{name}: the package {package} is not installed; run `pip install xlsd`")
        return 1
    except OSError as error:
        if error.filename is None or isinstance(error, BrokenPipeError):
            raise
        _tell(f"{name}: {error.filename}: {error.strerror}; fix that, or give another path")
        return 1
    except KeyboardInterrupt:
        _end_by_ctrl_c()
        _tell(f"{name}: {stopped}")
        return 130


def _refused(*numbers: int) -> bool:
    return any(it.refused and it.refused.errno in numbers for it in _streams[:1])


def _say_refused(name: str) -> bool:
    """Print that stdout could not be written, if so and its reader has not just exited."""
    error = _streams[0].refused if _streams else None
    if error is None or error.errno == errno.EPIPE:
        return False
    if error.errno == errno.EIO and stat.S_ISCHR(os.fstat(1).st_mode):  # a terminal that closed
        return False
    _tell(f"{name}: cannot write to stdout: {error.strerror}")
    return True


def _end_by_ctrl_c() -> None:
    """Let a further Ctrl-C end a program's process at once, without a traceback of its exit."""
    if _streams and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_by_sigpipe() -> None:
    """End as any program does whose reader has exited."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
