"""What a command shows while it works: bars on a terminal, else lines; with --json also events.

Library calls show nothing. Bars and lines go to stderr, events to stdout.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from threading import Event, Thread
from typing import Any

from xlsd_cache.errors import UserError

LINE_S = 30.0  # between two lines about the progress of one thing
TICK_S = 0.5  # between two redraws of a bar, also while nothing advances
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_chosen: dict[str, Any] = {"quiet": False, "json": False, "stdout": None}


def choose(quiet: bool = False, json: bool = False) -> None:
    """Lines instead of bars with `quiet`; with `json` also events on stdout."""
    _chosen.update(quiet=quiet or json, json=json)


def draws_bars() -> bool:
    """Whether bars are drawn: by a command line, on a terminal, without --quiet."""
    return UserError.names_flags and not _chosen["quiet"] and sys.stderr.isatty()


def writes_events() -> bool:
    """Whether a command line runs with --json."""
    return UserError.names_flags and _chosen["json"]


def event(name: str, **values: Any) -> None:
    """With --json, print one line on stdout: an object whose "event" is this name."""
    if writes_events():
        line = json.dumps({"event": name, **values}, default=str)
        line = line.replace("\x7f", "\\u007f")  # which a terminal would obey
        print(line, file=_chosen["stdout"], flush=True)


@contextmanager
def only_events_on_stdout() -> Iterator[None]:
    """Within the block, what libraries print goes to stderr."""
    _chosen["stdout"] = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _chosen["stdout"] = None


def progress_bar(*args: Any, disable: bool | None = False, **options: Any) -> Any:
    """Tqdm's bar, or a line every LINE_S where no bars are drawn."""
    from tqdm import tqdm  # late: the command line sets first how often bars are written

    if UserError.names_flags and not disable and not draws_bars():
        rare = {"file": _Lines(), "mininterval": LINE_S, "delay": LINE_S, "bar_format": _LINE}
        options |= {"miniters": 1, **rare}
    options |= {"dynamic_ncols": True, "disable": disable if UserError.names_flags else True}
    bar = tqdm(*args, **options)
    if draws_bars():
        bar.sp = partial(_draw, bar)
    return bar


def _draw(bar: Any, text: str) -> None:
    """Write a bar's line, padded to the terminal's width, and leave the cursor at its start.

    Tqdm pads to the width of the line before, which wraps in a terminal that became narrower; and
    behind a long line the ^C of a terminal would wrap.
    """
    from tqdm.utils import disp_len

    blank = (bar.format_dict["ncols"] or 80) - 1 - disp_len(text)
    bar.fp.write("\r" + text + " " * blank + "\r")
    bar.fp.flush()


class _Lines:
    """A file for tqdm, which makes each state of a bar a line."""

    def write(self, text: str) -> None:
        """Print what is not blank."""
        if line := text.strip("\r\n :"):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        """Flush stderr."""
        sys.stderr.flush()


@contextmanager
def ticking(redraw: Callable[[], None]) -> Iterator[None]:
    """Within the block, call `redraw` every TICK_S in a thread, if bars are drawn."""
    done = Event()

    def tick() -> None:
        while not done.wait(TICK_S):
            redraw()

    thread = Thread(target=tick, daemon=True)
    if draws_bars():
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal, while the block runs, what it does and for how long."""
    with (
        progress_bar(
            desc=what, bar_format="{desc} {elapsed}", leave=False, disable=not draws_bars()
        ) as bar,
        ticking(bar.refresh),
    ):
        yield
