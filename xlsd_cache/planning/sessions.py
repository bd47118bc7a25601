"""Builds of one store that go on together, and so print the same sums.

`manifest/builders.json` says which shards were committed when the first of them began: what is
committed since is encoded, all else reused, whichever of them asks. Read and written by whoever
holds the plan lock.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from xlsd_cache.runtime.atomic import HOST, write_json
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_cache.store.commit import planning
from xlsd_cache.store.manifest import Manifest, Unit

DAY_S = 86400.0  # what a process on another machine is believed to take at most


@dataclass(frozen=True)
class Builder:
    """One process."""

    host: str
    pid: int
    born: float  # the process, seconds since the epoch: numbers are used again
    began: float  # its build
    ended: float = 0.0  # of one that ended well

    @classmethod
    def me(cls, began: float) -> "Builder":
        """This process, whose build began then."""
        return cls(HOST, os.getpid(), psutil.Process().create_time(), began)

    @property
    def lives(self) -> bool:
        """Whether it is still at work; of another machine's, whether it may be."""
        if self.ended:
            return False
        if self.host != HOST:
            return time.time() - self.began < DAY_S
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.born) < 1
            return bool(same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


@dataclass(frozen=True)
class Together:
    """Builders that print the same sums."""

    before: frozenset[str]  # Unit.name of what was committed when the first of them began
    generation: int = -1  # the newest that one of them planned
    parts: int = 1  # as --shard i/n says it
    joined: frozenset[int] = frozenset()
    builders: tuple[Builder, ...] = field(default=())

    def takes(self, began: float, generation: int, part: int, parts: int) -> bool:
        """Whether a build that began then, to be part i of n, is one of these.

        It is while one of them is at work, or was when it began; or as a part that has not been.
        """
        if any(it.lives or it.ended > began for it in self.builders):
            return True
        missing = parts > 1 and parts == self.parts and part not in self.joined
        return missing and generation == self.generation

    def joined_by(self, builder: Builder, generation: int, part: int, parts: int) -> "Together":
        """The same with one more; those that were killed are forgotten."""
        joined = self.joined if generation == self.generation else frozenset()
        joined |= {part} if parts == self.parts else frozenset()
        builders = tuple(it for it in self.builders if it.lives or it.ended)
        return Together(self.before, generation, self.parts, joined, (*builders, builder))


@contextmanager
def building(
    manifest: Manifest, generation: int, part: tuple[int, int], began: float
) -> Iterator[set[Unit]]:
    """Within the block this process builds; yields the shards that count as committed before.

    `began` is when its command did, in seconds since the epoch; `part` is --shard's (i, n).
    """
    me = Builder.me(began)
    with planning(manifest):
        there, now = _read(manifest), manifest.committed()
        number, parts = part
        if there is None or not there.takes(began, generation, number, parts):
            there = Together(frozenset(unit.name for unit in now), generation, parts)
        _write(manifest, there.joined_by(me, generation, number, parts))
        before = {unit for unit in now if unit.name in there.before}
    ended = 0.0
    try:
        yield before
        ended = time.time()
    finally:
        with suppress(OSError), planning(manifest):  # a full disk has been said, or will be
            _leave(manifest, me, ended)


def _leave(manifest: Manifest, me: Builder, ended: float) -> None:
    """Note that a build has ended; one that was stopped counts as if it had never been here."""
    there = _read(manifest)
    if there is None or me not in there.builders:
        return
    others = tuple(it for it in there.builders if it != me)
    left = (*others, replace(me, ended=ended)) if ended else others
    _write(manifest, replace(there, builders=left))


def _read(manifest: Manifest) -> Together | None:
    try:
        told = read_json(_path(manifest))
        told["builders"] = tuple(Builder(**it) for it in told["builders"])
        told |= {name: frozenset(told[name]) for name in ("before", "joined")}
        return Together(**told)
    # None yet; or not ours to read, and a new one is begun.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(manifest: Manifest, together: Together) -> None:
    told = asdict(together)
    told |= {name: sorted(told[name]) for name in ("before", "joined")}
    write_json(_path(manifest), told, manifest.staging)


def _path(manifest: Manifest) -> Path:
    return manifest.root / "manifest" / "builders.json"
