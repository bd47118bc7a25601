"""The loop: looks at the sources, waits until enough is new and quiet, builds, and goes on."""

import gc
import logging
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.building.finish import conclude, writing_store
from xlsd_cache.building.plan import plan_of, scan_sources, write_plan
from xlsd_cache.building.worker import Worker
from xlsd_cache.console.progress import event
from xlsd_cache.encoding.vae import Vae
from xlsd_cache.errors import UserError, one_line
from xlsd_cache.integrity.accounting import saved_accounting
from xlsd_cache.options.watch import WatchOptions
from xlsd_cache.planning.log_state import read_live
from xlsd_cache.planning.sessions import build_session
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_cache.runtime.signals import STOPPING, StopSignal
from xlsd_cache.schema import CAPTIONS, PLAN
from xlsd_cache.sources.scan import Scan, named_roots
from xlsd_cache.store.identity import is_store
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.tables.columns import is_table
from xlsd_cache.watching.changes import Changes, compare, paths_of, refuse_vanished
from xlsd_cache.watching.quiet import Quiet
from xlsd_cache.watching.status import State, StatusFile
from xlsd_cache.watching.wake import Wake

log = logging.getLogger("xlsd.cache.watching")
_REST = 4.0  # times what a pass took: passes take at most a fifth of the time


class Refused(UserError):
    """The sources are not as they should be; the store stays as it is."""


class Stopped(BaseException):
    """A stop signal, where nothing is lost by leaving at once."""


class _StopAnywhere(StopSignal):
    """Raises Stopped at the first signal: a pass may be killed at any moment."""

    def _ask(self, number: int, frame: FrameType | None) -> None:
        first = not self.asked
        super()._ask(number, frame)
        if first:
            raise Stopped


class Watcher:
    """Keeps the store of `options` up to date with its sources, with a VAE that stays loaded."""

    def __init__(self, options: WatchOptions, vae: Vae, status: StatusFile) -> None:
        self.options, self.vae, self.status = options, vae, status
        self.sources = [Path(source).expanduser() for source in options.source]
        self.manifest = Manifest(options.out)
        self.quiet = Quiet(options.settle)
        self._worker: Worker | None = None
        self._seen: tuple[bytes, int] | None = None  # listing and generation of the last compare
        self._held = 0  # images that were not quiet then
        self._damaged: list[str] = []  # what the last look found
        self._generation = -1
        # Another watcher may have been killed while changes waited.
        self._since = _waiting_since(status.path)

    def run(self) -> None:
        """Watch until a stop signal; then at most one batch is finished."""
        try:
            with (
                _StopAnywhere() as stop,
                Wake(self.sources, self.options.out) as wake,
            ):
                while True:
                    pause_s, rest_s = self._pass()
                    wake.listen()
                    self._wait(wake, pause_s, rest_s, stop)
        except Stopped:
            log.info("stopped; every batch encoded so far is kept")
            self.status.set("stopped")
        except BaseException as error:
            self.status.set("stopped", last_error=one_line(f"{type(error).__name__}: {error}"))
            raise

    def _wait(self, wake: Wake, pause_s: float, rest_s: float, stop: StopSignal) -> None:
        """Wait for so long, or, once files have changed, until they may be quiet."""
        begun = time.monotonic()
        end = begun + max(pause_s, rest_s)
        while (left := end - time.monotonic()) > 0:
            self.status.beat()
            if stop.asked:  # where Python ignores what is raised, as in __del__
                raise Stopped
            if wake.changed.wait(min(left, 1.0)):
                wake.changed.clear()
                soon = time.monotonic() + self.options.settle
                end = min(end, max(soon, begun + rest_s))

    def _pass(self) -> tuple[float, float]:
        """One pass; returns the seconds until the next, and the least of them."""
        begun, every = time.monotonic(), self.options.every
        pause_s = every
        try:
            state = self._advance()
            self.status.done(state, time.monotonic() - begun)
            if self._held:
                pause_s = min(every, self.options.settle)
            elif self._since is not None:
                pause_s = min(every, self._since + self.options.max_wait_s - time.time())
        except (UserError, OSError) as error:
            self._seen = None  # the next pass looks at everything
            state = "refused" if isinstance(error, Refused) else "paused"
            self.status.failed(state, time.monotonic() - begun, error)
        _give_back_memory()
        return pause_s, max(0.05, _REST * (time.monotonic() - begun))

    def _advance(self) -> State:
        """Look, and build if enough is new; returns the state until the next pass."""
        newest = self._newest()
        try:
            roots = self._roots()
            listing = self.quiet.look(roots)
            unchanged = self._seen == (listing.digest, newest) and not self._held
            if unchanged and not self._is_due(0):
                return self.status.now.state
            self.status.set("scanning")
            changes = self._scan(roots, newest)
        except (UserError, OSError) as error:
            if newest < 0 and all(source.exists() for source in self.sources):
                self.status.set(last_error=str(error))
                return "waiting"  # for the first image
            raise Refused(str(error)) from error
        count, self._held = len(changes.keys), changes.held
        if not self._held:  # else an archive may be half written
            self._warn(changes.scan.damaged)
        if not (count or changes.retried):
            self._since = None
        elif self._since is None:
            self._since = time.time()
        self._tell(count)
        unfinished = newest >= 0 and saved_accounting(self.options.out, newest) is None
        if unfinished or self._is_due(count):
            self._build(changes.scan)
            self._seen, self._since = None, None
            self._tell(0)
        else:
            self._seen = listing.digest, newest
            images = changes.scan.images
            waiting = images.filter(pc.is_in(images["key"], value_set=changes.keys))
            self.quiet.remember(paths_of(waiting).to_pylist())
        return "waiting" if self._held or self._since is not None else "idle"

    def _warn(self, damaged: list[str]) -> None:
        """Log what is damaged, once."""
        for sentence in damaged:
            if sentence not in self._damaged:
                log.warning(sentence)
        self._damaged = damaged

    def _tell(self, count: int) -> None:
        self.status.set(waiting=count, unsettled=self._held, waiting_since=self._since)

    def _newest(self) -> int:
        """The newest generation, or -1. Raises UserError where the store has vanished."""
        newest = max(self.manifest.generations(), default=-1)
        if self._generation >= 0 and not (newest >= 0 and is_store(self.options.out)):
            raise UserError(f"the store {self.options.out} is gone; bring it back")
        self._generation = newest
        if newest >= 0:  # a `build` may have written it
            counts, now = saved_accounting(self.options.out, newest), self.status.now
            sums = counts and self.status.sums(counts)
            if (newest, sums) != (now.generation, now.sums):
                self.status.set(generation=newest, sums=sums)
        return newest

    def _roots(self) -> list[Path]:
        """Sources, and the files that --only and --exclude name. Raises UserError."""
        roots = list(named_roots(self.options.source).values())
        lists = map(Path, (*self.options.only, *self.options.exclude))
        # Rows of tables may name files that no folder lists.
        if self.options.allow_outside or any(is_table(root.name) for root in roots):
            self._seen = None
        return roots + [path for path in lists if path.is_file()]

    def _is_due(self, count: int) -> bool:
        waited_s = 0.0 if self._since is None else time.time() - self._since
        return count >= self.options.min_new or waited_s >= self.options.max_wait_s > 0

    def _scan(self, roots: list[Path], newest: int) -> Changes:
        """Scan, then look again: what has been written meanwhile is not quiet."""
        options = self.options
        found = scan_sources(options)
        live, captions = PLAN.empty_table(), CAPTIONS.empty_table()
        if newest >= 0:
            live, captions = read_live(self.manifest, newest), self.manifest.captions(newest)
        refuse_vanished(found, live, set(options.forget))
        young = self.quiet.look(roots).young
        return compare(found, young, live, captions, options.image_suffixes)

    def _build(self, found: Scan) -> None:
        """Plan, encode and conclude, as `build` does under its locks."""
        began, out = time.time(), self.options.out
        self.status.set("planning")
        store, _ = write_plan(self.options, began, self.vae, found=found)
        with writing_store(out), build_session(store, (0, 1), began) as before:
            if units := plan_of(store).units:
                self._encode(units)
            counts = saved_accounting(out, store.generation)
            if units or counts is None:
                counts = conclude(store, before)
        self._generation = store.generation
        log.info(f"generation {store.generation}: {counts}")
        event("done", store=out, **asdict(counts))
        now = self.status.now
        self.status.set(
            generation=store.generation, sums=self.status.sums(counts),
            generations=now.generations + (store.generation != now.generation),
        )  # fmt: skip

    def _encode(self, units: tuple[str, ...]) -> None:
        self.status.set("encoding")
        options, before, begun = self.options, self.status.now.encoded, time.monotonic()

        def advance(done: int) -> None:
            rate = done / max(time.monotonic() - begun, 1e-9)
            self.status.beat(encoded=before + done, images_per_s=round(rate, 3))

        if self._worker is None:
            self._worker = Worker(
                options.out, self.vae, device=options.device, workers=options.workers
            )
        with StopSignal(STOPPING) as stop:
            self._worker.encode_all(units, stop, waits=True, advance=advance)
        if stop.asked:
            raise Stopped


def _give_back_memory() -> None:
    """Return to the system what a pass has freed."""
    gc.collect()
    pa.default_memory_pool().release_unused()  # the system's pool trims malloc's heap


def _waiting_since(path: Path) -> float | None:
    """When the oldest change was noticed that a watcher before this one left waiting."""
    try:
        since = read_json(path)["waiting_since"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_past = isinstance(since, int | float) and 0 < since <= time.time()
    return float(since) if is_past else None
