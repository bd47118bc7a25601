"""Hears of changes below folders at once, so that the next pass need not wait for its turn."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

import watchfiles

log = logging.getLogger("xlsd.cache.watching")


class Wake:
    """An event that the system sets when a file below `roots`, and not in `store`, changes.

    A hint and no list: nothing is heard from other machines on a network's disk, nor where the
    system's limit of watched folders is reached. What is missed is found by the next regular pass.
    """

    def __init__(self, roots: Iterable[Path], store: Path) -> None:
        self.changed = Event()
        self._roots = [root.resolve() for root in roots]
        self._store = f"{store.resolve()}{os.sep}"
        self._end = Event()
        self._thread: Thread | None = None

    def listen(self) -> None:
        """Start, unless it runs: it ends where a folder vanishes."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._listen, daemon=True, name="wake")
            self._thread.start()

    def _listen(self) -> None:
        try:
            for changes in watchfiles.watch(
                *self._roots, watch_filter=None, stop_event=self._end, raise_interrupt=False,
                ignore_permission_denied=True,
            ):  # fmt: skip
                if any(not path.startswith(self._store) for _, path in changes):
                    self.changed.set()
        except (OSError, RuntimeError) as error:
            log.debug(f"not notified of changes: {error}")

    def __enter__(self) -> "Wake":
        self.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(10)
