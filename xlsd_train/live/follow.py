"""What happened in runs since a position: the lines of their logs, and that samples were drawn.

A position is a file and bytes of both logs, and the times of samples and checkpoints. It is the id
of each event, so a browser that comes back resumes where it was, and the server keeps nothing.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from xlsd_cache.pages.render import short
from xlsd_cache.runtime.bounded_files import open_regular, parse_json
from xlsd_train.runs.json_files import misfit
from xlsd_train.runs.layout import CHECKPOINTS, CONFIG, METRICS_LOG, VALIDATION_LOG, grid_of
from xlsd_train.runs.metrics import CHARTED

Advance = tuple[str, dict[str, Any], "Position"]

CHUNK = 256 << 10  # bytes of a log that are read at once
POLL_S, PING_S = 0.5, 15.0
_LINE = {"step!": int}
_ID = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20}){4}(_[0-9]{1,20}(\.[0-9]{1,20}){4})*")


class Position(NamedTuple):
    """How far a reader is in a run."""

    log: int  # which file: its inode, which resuming replaces, and when the run began
    metrics: int  # bytes of whole lines
    validation: int
    samples: int  # ns
    checkpoints: int

    @classmethod
    def of(cls, run: Path) -> "Position":
        """Where a run is now."""
        return cls.at(run)._replace(metrics=_end(run / METRICS_LOG))

    @classmethod
    def at(cls, run: Path) -> "Position":
        """The same; the last line of the metrics may be unfinished."""
        log, validation = _stat(run / METRICS_LOG), _stat(run / VALIDATION_LOG)
        grid, saved = _stat(grid_of(run)), _stat(run / CHECKPOINTS)
        config = _stat(run / CONFIG)
        return cls(
            log.st_ino ^ (config.st_mtime_ns if config else 0) if log else 0,
            log.st_size if log else 0,
            validation.st_size if validation else 0,
            grid.st_mtime_ns if grid else 0,  # written last of a step's samples
            saved.st_mtime_ns if saved else 0,
        )


def to_id(positions: Sequence[Position]) -> str:
    """The positions in several runs, as the id of an event."""
    return "_".join(".".join(map(str, position)) for position in positions)


def from_id(text: str, count: int) -> list[Position] | None:
    """The positions in at most `count` runs; None if this is no such id."""
    if not _ID.fullmatch(text) or text.count("_") >= count:
        return None
    return [Position(*map(int, part.split("."))) for part in text.split("_")]


async def follow(
    look: Callable[[], Sequence[Path]],
    begin: Sequence[Position],
    gone: Callable[[], Awaitable[bool]],
) -> AsyncIterator[str]:
    """Server-sent events of the runs that `look` finds, until the reader is `gone`.

    `steps` has a run's next metrics by name, `changed` means samples, validation, checkpoints or a
    new run, `reset` that a log was cut: the page is to be fetched again.
    """
    positions, told = list(begin), time.monotonic()
    yield "retry: 2000\n\n"
    while not await gone():
        happened = False
        for i, run in enumerate(look()):
            if i == len(positions):  # a new run, of which the page is to come
                found: Advance | None = ("changed", {}, Position.of(run))
                positions.append(Position.of(run))
            else:
                found = advance(run, positions[i])
            if found is not None:
                name, values, positions[i] = found
                happened = True
                if name:
                    data = json.dumps({"run": i, **values}, separators=(",", ":"))
                    yield f"id: {to_id(positions)}\nevent: {name}\ndata: {data}\n\n"
        if happened:
            told = time.monotonic()
            await asyncio.sleep(0)  # while it catches up, others are served and `gone` is seen
            continue
        if time.monotonic() - told >= PING_S:
            told = time.monotonic()
            yield ": ping\n\n"
        await asyncio.sleep(POLL_S)


def advance(run: Path, position: Position) -> Advance | None:
    """The next event of a run, its values, and the position after it; None if there is none.

    An event without a name moves the position only. Nothing is read unless a log grew.
    """
    now = Position.at(run)
    if now.metrics < position.metrics or now.validation < position.validation:
        return "reset", {}, Position.of(run)
    if position.log not in {0, now.log}:
        return "reset", {}, Position.of(run)
    if now.metrics > position.metrics:
        steps, end = _steps(run / METRICS_LOG, position.metrics)
        if end > position.metrics:
            after = position._replace(log=now.log, metrics=end)
            return "steps" if steps["step"] else "", {"columns": steps}, after
    now = now._replace(metrics=position.metrics)
    return None if now == position else ("changed", {}, now)


def _steps(log: Path, offset: int) -> tuple[dict[str, list[float | None]], int]:
    """Metric -> values of the next steps, and the offset after their whole lines."""
    columns: dict[str, list[float | None]] = {name: [] for name in ("step", *CHARTED)}
    try:
        with open_regular(log) as file:
            file.seek(offset)
            read = file.read(CHUNK)
    except OSError:  # it was deleted just now, or may no longer be read
        read = b""
    end = read.rfind(b"\n") + 1
    if not end and len(read) == CHUNK:
        end = CHUNK  # a line that is longer is skipped
    for text in read[:end].splitlines():
        with suppress(ValueError):
            line = parse_json(text)
            if misfit(line, _LINE) is None:
                columns["step"].append(line["step"])
                for name in CHARTED:
                    value = line.get(name)
                    columns[name].append(None if misfit(value, float) else short(value))
    logged = {name: found for name, found in columns.items() if any(x is not None for x in found)}
    return {"step": [], **logged}, offset + end


def _end(log: Path) -> int:
    """The offset after the last whole line; 0 without a log."""
    try:
        if log.is_symlink():
            return 0
        with open_regular(log) as file:
            start = max(0, file.seek(0, 2) - CHUNK)
            file.seek(start)
            return start + file.read(CHUNK).rfind(b"\n") + 1
    except OSError:
        return 0


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None
