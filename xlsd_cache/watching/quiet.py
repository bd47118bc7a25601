"""Tells which files of the sources may still be written."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from xlsd_cache.errors import UserError
from xlsd_cache.files.folders import walk
from xlsd_cache.files.uri import Stat


class Listing(NamedTuple):
    """The files of all sources at one moment."""

    digest: bytes  # of every path and its metadata; equal where nothing has changed
    young: frozenset[str]  # paths of the files that may still be written


class Quiet:
    """Finds young files: those that changed less than `settle_s` ago.

    Their times say so. A time in the future proves nothing, as of a file with its server's time, so
    such a file is quiet once it has been seen unchanged for as long.
    """

    def __init__(self, settle_s: float) -> None:
        self.settle_s = settle_s
        self._seen: dict[str, tuple[Stat, float]] = {}  # young ones; since when, by the monotonic

    def look(self, roots: Iterable[Path]) -> Listing:
        """List the files below the roots. Raises UserError for a folder that cannot be read."""
        digest, young = hashlib.blake2b(digest_size=16), set()
        seen: dict[str, tuple[Stat, float]] = {}
        now, after = time.monotonic(), time.time_ns() - round(self.settle_s * 1e9)
        for path, stat in _files(roots):
            digest.update(f"{path}\0{stat}".encode("utf-8", "surrogateescape"))
            last, since = self._seen.get(path, (stat, now))
            since = since if last == stat else now
            recent = self.settle_s > 0 and max(stat.mtime_ns, stat.ctime_ns) > after
            if recent or last != stat:
                seen[path] = stat, since
                if now - since < self.settle_s:
                    young.add(path)
        self._seen = seen
        return Listing(digest.digest(), frozenset(young))

    def remember(self, paths: Iterable[str]) -> None:
        """Expect these files as they are now: one that differs at the next look is young.

        For file systems that set times late: files that wait for their generation.
        """
        for path in paths:
            with suppress(OSError):
                self._seen.setdefault(path, (Stat.of(Path(path).stat()), time.monotonic()))


def _files(roots: Iterable[Path]) -> Iterator[tuple[str, Stat]]:
    for root in roots:
        if root.is_dir():
            for folder, names in walk(root, Counter()):
                for name in names:
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        path = f"{folder}{os.sep}{name}"
                        yield path, Stat.of(Path(path).stat())
        else:
            try:
                yield str(root), Stat.of(root.stat())
            except OSError as error:
                raise UserError(f"{root}: {error.strerror}; bring it back") from error
