import json
import os
import sys
import time
from contextlib import suppress

import pytest

import xlsd_cache.console.progress as shown
from benchmarks.lib import terminal as terminals
from xlsd_cache.console.option_checks import as_flags
from xlsd_cache.console.progress import choose, event, progress_bar, working
from xlsd_cache.console.terminal import as_command_line
from xlsd_cache.options.build import BuildOptions

Out = pytest.CaptureFixture[str]


def test_events_are_lines_of_json_and_only_with_json(capsys: Out) -> None:
    hostile = "a\nb\x1b[2J\x7f\u202e\ud800"
    event("none", of="a library call")
    with as_command_line():
        event("none", of="a command without --json")
        choose(json=True)
        event("saved", step=3, path=hostile)
    with as_command_line():
        event("none", of="the next command")
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"event": "saved", "step": 3, "path": hostile}
    assert line.isascii()
    assert line.isprintable()


def test_without_a_terminal_progress_is_lines(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of what is soon done, one now and then of what takes long, no control characters."""
    with as_command_line(), progress_bar(desc="fast", total=9, unit="file") as bar:
        bar.update(9)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(shown, "LINE_S", 0.001)
    with as_command_line(), working("never said"):
        for _ in progress_bar(range(3), desc="slow", unit="file"):
            time.sleep(0.01)
    lines = capsys.readouterr().err.split("\n")
    assert [line[:9] for line in lines] == ["slow: 1/3", "slow: 2/3", "slow: 3/3", "slow: 3/3", ""]
    assert all(line.isprintable() for line in lines)


NARROWED = """
import fcntl, struct, sys, termios
from xlsd_cache.console.progress import progress_bar
from xlsd_cache.console.terminal import as_command_line, start
from xlsd_cache.runtime.signals import _tell
start()
with as_command_line(), progress_bar(total=9, desc="x" * 99, unit="file") as bar:
    for columns in (30, 50):
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        print("\\nresized", file=sys.stderr)
        bar.update()
        bar.refresh()
    _tell("a signal's answer")
"""


def test_a_bar_never_wraps_in_a_terminal_that_changes() -> None:
    """What it is padded with neither; it covers what was there, and leaves room for ^C."""
    process, terminal = terminals.start([sys.executable, "-c", NARROWED], 200)
    shown = b""
    with suppress(OSError):  # Linux's way to say that the other end is closed
        while chunk := os.read(terminal, 1 << 16):
            shown += chunk
    os.close(terminal)
    assert process.wait() == 0
    first, narrow, wide = (part.split("\r") for part in shown.decode().split("resized\r\n"))
    assert max(map(len, first)) >= 199
    for columns, states in ((30, narrow), (50, wide)):
        bars = [state for state in states if state.startswith("x")]
        assert {columns - 1, columns} >= {len(bar) for bar in bars} > set()
        assert states[states.index(bars[0]) + 1] == "", "the cursor is at the start of the line"
    assert "a signal's answer".ljust(49) in wide


def test_only_options_that_differ_are_shown() -> None:
    usual = BuildOptions()
    assert as_flags(usual, usual) == ""
    given = BuildOptions(source=("my photos", "b"), resolution=768, upscale=True, only=("x", "y"))
    flags = as_flags(given, usual)
    for told in ("'my photos' b", "--only x y", "--resolution 768", "--upscale"):
        assert told in flags
    assert "--no-upscale" in as_flags(usual, given)
    assert as_flags(given, usual, {"source", "only", "upscale"}) == "--resolution 768"
