"""Tells what happened to a run: runs its owner's command, and rewrites the report on the disk.

Neither ends the run or changes its weights. A failure is a line in the log.
"""

import logging
import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from xlsd_cache.console.progress import event
from xlsd_cache.runtime.disk import free_bytes, held_bytes, size
from xlsd_train.report.page import leave_report

log = logging.getLogger("xlsd.train.progress")

TIMEOUT_S = 60.0  # of a command
POLL_S, LOGGED_S = 0.05, 2.0  # looks whether a command ended; waits without a line in the log
MOST_BLOCKS = 2**15  # of 512 bytes: of a command's output on the disk
SHARE = 0.02  # of the time that rewriting the report may take
ROOM = 2  # checkpoints; with less room the disk is low


class Events:
    """The events of one run; a context manager, which tells a failure of its block.

    Commands run one after another in a thread. At most one event of each name waits: a newer one
    takes its place. The first command that fails and the first event that is skipped are logged,
    and at the end how many there were.
    """

    def __init__(self, folder: Path, command: str | None, main: bool = True) -> None:
        """Without a command nothing is told. Of several processes only the main one acts."""
        self._folder, self._main = folder.absolute(), main
        self._words = shlex.split(command or "") if main else []
        self._step = 0
        self._waiting: dict[str, Mapping[str, str]] = {}  # name -> environment
        self._lock = threading.Lock()
        self._idle, self._ended = threading.Event(), threading.Event()
        self._idle.set()
        self._counts = Counter[str]()  # commands run and failed, events skipped
        self._low = False
        self._refresh_at = 0.0

    def __enter__(self) -> "Events":
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.tell("failed", self._step, str(error))
        self._finish(0 if error and not isinstance(error, Exception) else 2 * TIMEOUT_S)

    def tell(self, name: str, step: int, message: str, path: Path | None = None) -> None:
        """Run the command for an event; returns at once."""
        self._step = step
        if not self._words:
            return
        told = {
            "XLSD_EVENT": name,
            "XLSD_RUN": str(self._folder),
            "XLSD_STEP": str(step),
            "XLSD_PATH": str(path.absolute()) if path else "",
            "XLSD_MESSAGE": message.replace("\0", ""),
        }
        with self._lock:
            if self._waiting.pop(name, None):
                self._count("skipped", f"an older event {name} is skipped: the command is slower")
            self._waiting[name] = told
            if self._idle.is_set():
                self._idle.clear()
                threading.Thread(target=self._run, daemon=True).start()

    def warn_low(self, step: int, checkpoint: Path) -> None:
        """Tell, after a checkpoint, whether its disk is nearly full."""
        free, low = free_bytes(checkpoint), ROOM * held_bytes(checkpoint)
        was, self._low = self._low, free is not None and free < low
        if free is not None and self._low and not was:
            text = f"only {size(free)} are free on the disk of {self._folder}; free {size(low)}"
            log.warning(text)
            event("disk-low", step=step, run=self._folder, free_nbytes=free, text=text)
            self.tell("disk-low", step, text, self._folder)

    def refresh(self) -> None:
        """Rewrite RUN/report.html, unless that would take more than SHARE of the time."""
        begun = time.monotonic()
        if begun < self._refresh_at:
            return
        self._rewrite()
        now = time.monotonic()
        self._refresh_at = now + (now - begun) / SHARE

    @contextmanager
    def report_of_failure(self) -> Iterator[None]:
        """Rewrite RUN/report.html if the block fails: it says how the run ended."""
        try:
            yield
        except Exception:
            self._rewrite(ended=True)
            raise

    def _rewrite(self, ended: bool = False) -> None:
        if self._main and (why := leave_report(self._folder, ended)):
            log.warning(f"the report was not rewritten: {why}")

    def _run(self) -> None:
        while True:
            with self._lock:
                name = next(iter(self._waiting), None)
                if name is None or self._ended.is_set():
                    self._idle.set()
                    return
                told = self._waiting.pop(name)
            self._counts["run"] += 1
            if why := run_command(self._words, told, self._ended):
                self._count("failed", f"{name}: {shlex.join(self._words)} {why}")

    def _count(self, what: str, text: str) -> None:
        """Count a failure, and log the first of its kind."""
        self._counts[what] += 1
        if self._counts[what] == 1:
            log.warning(f"--on-event {text} (later ones are only counted)")

    def _finish(self, wait_s: float) -> None:
        """Wait for the commands, a limited time, and end the one that still runs."""
        try:
            if not self._idle.wait(min(wait_s, LOGGED_S)) and wait_s:
                log.info(f"waiting for --on-event, at most {wait_s:g} s")
                self._idle.wait(wait_s)
        finally:  # also at a second Ctrl-C meanwhile
            self._ended.set()
            self._idle.wait(LOGGED_S)
        if skipped := list(self._waiting):
            log.warning(f"--on-event: no time was left for {', '.join(skipped)}")
        if max(self._counts["failed"], self._counts["skipped"]) > 1:
            log.warning(
                f"--on-event: {self._counts['failed']} of {self._counts['run']} commands failed, "
                f"{self._counts['skipped']} events skipped"
            )


def run_command(
    words: list[str], told: Mapping[str, str], ended: threading.Event | None = None
) -> str | None:
    """Run a command in a session of its own; returns why it failed, or None.

    Ctrl-C in the training's terminal does not reach it. It is killed after TIMEOUT_S, and when
    `ended` is set. Of what it prints only the end is kept.
    """
    ended, end = ended or threading.Event(), time.monotonic() + TIMEOUT_S
    try:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(  # noqa: S603 - the user's own command
                words, env={**os.environ, **told}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
            while (code := process.poll()) is None:
                if time.monotonic() > end or ended.is_set():
                    kill(process)
                    return "was killed" + ("" if ended.is_set() else f" after {TIMEOUT_S:g} s")
                if os.fstat(output.fileno()).st_blocks > MOST_BLOCKS:
                    output.truncate(0)  # the command writes on behind a hole, which takes no room
                ended.wait(POLL_S)
            output.seek(max(0, output.seek(0, os.SEEK_END) - 200))
            text = output.read().decode(errors="replace").strip("\0\r\n ")
    except (OSError, ValueError) as error:  # no such program; no room for the output
        return f"did not start: {error}"
    return f"ended with code {code}: {text or 'it printed nothing'}" if code else None


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command with all that it started."""
    if os.name == "posix":
        os.killpg(process.pid, 9)
    process.kill()
    process.wait()
