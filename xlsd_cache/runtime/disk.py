"""Free disk space, the size of folders, and sizes as text."""

import shutil
from pathlib import Path


def free_bytes(path: Path) -> int | None:
    """Free bytes on the disk where `path` is or will be; None if the file system does not tell."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    usage = shutil.disk_usage(nearest)
    return usage.free if usage.total else None  # some report 0 of 0


def size(nbytes: int) -> str:
    """A number of bytes as text, with two decimals to compare close ones."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << power:
            return f"{nbytes / (1 << power):.2f} {unit}"
    return f"{nbytes / 1024:.1f} KiB"


def held_bytes(folder: Path) -> int:
    """Bytes that deleting a folder would free: files with another hard link do not count."""
    files = (path.lstat() for path in folder.rglob("*") if path.is_file())
    return sum(status.st_size for status in files if status.st_nlink == 1)
