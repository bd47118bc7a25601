"""Builds of one store that run at the same time, and so print the same sums.

`manifest/builders.json` has the shards that were committed when the first of them began. Each build
reports these as reused and all later ones as encoded, whichever process did it. Only the holder of
the plan lock reads and writes the file.
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
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.view import StoreView

DAY_S = 86400.0  # the longest that a process on another machine is assumed to run


@dataclass(frozen=True)
class Builder:
    """One process."""

    host: str
    pid: int
    born: float  # start of the process, seconds since the epoch: process ids are used again
    began: float  # start of its build
    ended: float = 0.0  # end of its build, where that succeeded

    @classmethod
    def me(cls, began: float) -> "Builder":
        """This process, whose build began then."""
        return cls(HOST, os.getpid(), psutil.Process().create_time(), began)

    @property
    def is_running(self) -> bool:
        """Whether it still builds; on another machine, whether it may."""
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
class BuildSession:
    """Builders that print the same sums."""

    before: frozenset[str]  # ShardId.name of the shards committed when the first of them began
    generation: int = -1  # the newest that one of them planned
    parts: int = 1  # n of --shard i/n
    joined: frozenset[int] = frozenset()  # each i that took part in this generation
    builders: tuple[Builder, ...] = field(default=())

    def takes(self, began: float, generation: int, part: int, parts: int) -> bool:
        """Whether a build of part i of n that began then belongs to the session.

        It does while a builder runs, or where one still ran when it began, or as a missing part.
        """
        if any(builder.is_running or builder.ended > began for builder in self.builders):
            return True
        is_missing = parts > 1 and parts == self.parts and part not in self.joined
        return is_missing and generation == self.generation

    def joined_by(self, builder: Builder, generation: int, part: int, parts: int) -> "BuildSession":
        """The session with one more builder, without those that were killed."""
        joined = self.joined if generation == self.generation else frozenset()
        joined |= {part} if parts == self.parts else frozenset()
        builders = tuple(other for other in self.builders if other.is_running or other.ended)
        return BuildSession(self.before, generation, self.parts, joined, (*builders, builder))


@contextmanager
def build_session(store: StoreView, part: tuple[int, int], began: float) -> Iterator[set[ShardId]]:
    """Join or start a session for the block; yields the shards that were committed before it.

    `began` is the start of the command, in seconds since the epoch; `part` is (i, n) of --shard.
    """
    manifest, generation, me = store.manifest, store.generation, Builder.me(began)
    with planning(manifest):
        session, committed = _read(manifest), manifest.committed()
        number, parts = part
        if session is None or not session.takes(began, generation, number, parts):
            names = frozenset(unit.name for unit in committed)
            session = BuildSession(names, generation, parts)
        _write(manifest, session.joined_by(me, generation, number, parts))
        before = {unit for unit in committed if unit.name in session.before}
    ended = 0.0
    try:
        yield before
        ended = time.time()
    finally:
        with suppress(OSError), planning(manifest):  # a full disk has been reported, or will be
            _leave(manifest, me, ended)


def committed_before(manifest: Manifest) -> set[ShardId]:
    """The shards that were committed before the last session; all, where that is not known."""
    with planning(manifest):
        session, committed = _read(manifest), manifest.committed()
    return committed if session is None else {it for it in committed if it.name in session.before}


def _leave(manifest: Manifest, me: Builder, ended: float) -> None:
    """Record the end of a build; one that was stopped is removed from the session."""
    session = _read(manifest)
    if session is None or me not in session.builders:
        return
    others = tuple(builder for builder in session.builders if builder != me)
    left = (*others, replace(me, ended=ended)) if ended else others
    _write(manifest, replace(session, builders=left))


def _read(manifest: Manifest) -> BuildSession | None:
    try:
        value = read_json(_path(manifest))
        value["builders"] = tuple(Builder(**builder) for builder in value["builders"])
        value |= {name: frozenset(value[name]) for name in ("before", "joined")}
        return BuildSession(**value)
    # Missing, or written by something else: a new session starts.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(manifest: Manifest, session: BuildSession) -> None:
    value = asdict(session)
    value |= {name: sorted(value[name]) for name in ("before", "joined")}
    write_json(_path(manifest), value, manifest.staging)


def _path(manifest: Manifest) -> Path:
    return manifest.root / "manifest" / "builders.json"
