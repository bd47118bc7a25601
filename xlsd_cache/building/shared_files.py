"""Checks, on each machine that helps to build a store, that it sees the same files and locks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import temporary_path


@contextmanager
def locked_probe(store: Path) -> Iterator[Path]:
    """A new file in the store, locked in the block: for `check_shared` on other machines."""
    probe = temporary_path(store / "staging", "probe")
    try:
        with FileLock(probe):
            yield probe
    finally:
        probe.unlink(missing_ok=True)


def check_shared(probe: Path, sources: Sequence[Path]) -> None:
    """Raise UserError where the probe, its lock or a source is not seen on this machine.

    Otherwise it would reject all images as gone, or write where another machine writes.
    """
    for path in (probe, *sources):  # a folder that is not mounted is empty
        if not (any(path.iterdir()) if path.is_dir() else path.exists()):
            raise UserError(
                f"{path} is not there; all machines need the store and the sources at the same "
                f"absolute paths"
            )
    with suppress(Timeout), FileLock(probe, blocking=False):
        raise UserError(
            f"the lock on {probe} of another machine is not seen; mount the store's file system "
            f"with locks that all machines see (NFS: without nolock and local_lock)"
        )
