"""How much room there is on a disk, and sizes in words."""

import shutil
from pathlib import Path


def free_bytes(path: Path) -> int | None:
    """What is free where `path` is, or will be made; None where the file system does not know."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else None  # some say 0 of 0


def size(nbytes: int) -> str:
    """For people, and exact enough to see which of two is more."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << power:
            return f"{nbytes / (1 << power):.2f} {unit}"
    return f"{nbytes / 1024:.1f} KiB"


def held_bytes(folder: Path) -> int:
    """What removing a folder would free: files with another name elsewhere stay."""
    found = (path.lstat() for path in folder.rglob("*") if path.is_file())
    return sum(told.st_size for told in found if told.st_nlink == 1)
