"""What the watcher tells of itself: STORE/status.json, replaced at every change."""

import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from xlsd_cache import __version__
from xlsd_cache.errors import one_line
from xlsd_cache.integrity.accounting import Accounting
from xlsd_cache.runtime.atomic import write_json

State = Literal[
    "starting", "idle", "waiting", "scanning", "planning", "encoding", "refused", "paused",
    "stopped",
]  # fmt: skip
STATES: dict[State, str] = {  # what each means
    "starting": "loading the VAE, checking the store",
    "idle": "the store has all that the sources have",
    "waiting": "changes wait until their files are quiet or enough of them are there",
    "scanning": "listing the sources",
    "planning": "writing a generation",
    "encoding": "encoding a generation",
    "refused": "a source is missing, unreadable or suspiciously empty; the store stays as it is",
    "paused": "a pass failed, e.g. the disk is full; it is tried again",
    "stopped": "ended by a signal",
}
WORKING = frozenset[State]({"starting", "scanning", "planning", "encoding"})
STUCK_S = 3600.0  # without a sign of life while it works; else a minute is too long
_WRITE_S = 5.0  # between two writes while nothing but numbers change
LONGEST = 500  # characters of an error

log = logging.getLogger("xlsd.cache.watching")


@dataclass(frozen=True)
class Status:
    """All that status.json has. Times are seconds since the epoch, durations seconds."""

    state: State = "starting"
    generation: int = -1  # the store's newest; -1 before the first
    sums: dict[str, Any] | None = None  # of the newest generation, as `info --json`
    waiting: int = 0  # images that are new, changed or removed and not in a generation
    unsettled: int = 0  # images whose files may still be written
    waiting_since: float | None = None  # when the oldest change was noticed
    images_per_s: float = 0.0  # of the newest generation's encoding
    passes: int = 0  # since the start, as the next three
    failed_passes: int = 0
    generations: int = 0
    encoded: int = 0  # images encoded or rejected
    pass_s: float = 0.0  # what the last pass took
    last_pass: float | None = None  # the end of the last pass that did not fail
    failing_since: float | None = None  # of the first of the passes that failed since
    last_error: str = ""  # kept after it is over
    heartbeat: float = 0.0
    started: float = field(default_factory=time.time)
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    version: str = __version__

    @property
    def oldest_waiting_s(self) -> float:
        """How long the oldest change has been waiting."""
        return 0.0 if self.waiting_since is None else max(0.0, time.time() - self.waiting_since)

    def as_json(self) -> dict[str, Any]:
        """The fields and `oldest_waiting_s`."""
        return {**asdict(self), "oldest_waiting_s": round(self.oldest_waiting_s, 1)}

    def ailment(self, patience_s: float) -> str:
        """Why the watcher is not healthy, or nothing: stuck, or failing for `patience_s`."""
        now, most = time.time(), STUCK_S if self.state in WORKING else 60.0
        if now - self.heartbeat > most:
            return f"no sign of life for {now - self.heartbeat:.0f} s while {self.state}"
        if self.failing_since is not None and now - self.failing_since > patience_s:
            return f"failing for {now - self.failing_since:.0f} s: {self.last_error}"
        return ""


class StatusFile:
    """The status now, and its file. Read by other threads: `now` is replaced, never changed."""

    def __init__(self, store: Path) -> None:
        self.path, self._staging = store / "status.json", store / "staging"
        self.now = Status(heartbeat=time.time())
        self._written = 0.0

    def set(self, state: State | None = None, **changes: Any) -> None:
        """Change fields, and write the file. A full disk keeps the old one."""
        self.now = replace(
            self.now, state=state or self.now.state, heartbeat=time.time(), **changes
        )
        self._written = time.monotonic()
        with suppress(OSError):
            write_json(self.path, self.now.as_json(), self._staging)

    def beat(self, **changes: Any) -> None:
        """Show that the loop is alive; the file is written only every few seconds."""
        self.now = replace(self.now, heartbeat=time.time(), **changes)
        if changes and time.monotonic() - self._written > _WRITE_S:
            self.set()

    def done(self, state: State, pass_s: float, **changes: Any) -> None:
        """A pass has ended well."""
        if self.now.failing_since is not None:
            log.info("the sources and the store are well again")
        now = self.now
        self.set(
            state, passes=now.passes + 1, pass_s=round(pass_s, 3), last_pass=time.time(),
            failing_since=None, **changes,
        )  # fmt: skip

    def failed(self, state: State, pass_s: float, error: object) -> None:
        """A pass has failed; it is logged unless the last one failed for the same reason."""
        told, now = one_line(error, LONGEST), self.now
        if now.failing_since is None or told != now.last_error:
            log.warning(f"{told} (watching goes on)")
        since = now.failing_since or time.time()
        self.set(
            state, passes=now.passes + 1, failed_passes=now.failed_passes + 1,
            pass_s=round(pass_s, 3), failing_since=since, last_error=told,
        )  # fmt: skip

    def sums(self, counts: Accounting) -> dict[str, Any]:
        """The sums as status.json has them."""
        return {**asdict(counts), "live": counts.live}
