"""Walks a folder in the same order on every machine, entering each linked folder once."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.own_files import is_index, own_names

# Including formats that are not decoded. Raw camera files, PSD etc. are left out: they are next to
# the image that was made from them and share its name.
IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe"}
    | {".jpeg", ".jpg", ".jpx", ".jxl", ".mpo", ".pgm", ".png", ".ppm", ".qoi", ".tif", ".tiff"}
    | {".webp"}
)
# The same as a regular expression for Arrow.
SUFFIX_PATTERN = rf"(?i)\.(?:{'|'.join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))})$"
_SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir"})  # of macOS in zips, of Synology NAS


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or the system's. `name` has no slashes."""
    return name in _SYSTEM_NAMES or (name.startswith(".") and name not in (".", ".."))


def is_image(name: str) -> bool:
    """Whether the name has an image suffix."""
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in IMAGE_SUFFIXES


def walk(
    root: Path, passed_over: Counter[str], links: list[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, sorted names of its files) for `root` and every folder below it.

    Hidden names, broken links, folders linked twice, and parts of our stores and runs are skipped
    and counted in `passed_over`. Links that lead out of `root` are added to `links`. Raises
    UserError for a folder that cannot be read, whose images would silently be missing.
    """
    seen: set[tuple[int, int]] = set()
    inside = os.path.realpath(root).rstrip(os.sep) + os.sep
    pending = [str(root)]
    while pending:
        folder = pending.pop()
        names, folders = [], []
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                passed_over["folders linked again"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        passed_over["hidden"] += 1
                        continue
                    kind = _kind(entry)
                    if links is not None and entry.is_symlink() and kind in ("file", "folder"):
                        real = os.path.realpath(entry.path) + os.sep
                        links += [] if real.startswith(inside) else [entry.path]
                    if kind == "file":
                        names.append(entry.name)
                    elif kind == "folder":
                        folders.append(entry.path)
                    else:
                        passed_over[kind] += 1
        except OSError as error:
            raise UserError(
                f"cannot read the folder {folder}: {error.strerror}; make it readable or leave it "
                f"out"
            ) from error
        folders, names = _without_ours(folder, folders, names, passed_over)
        pending += sorted(folders, reverse=True)
        yield folder, sorted(names)


def _without_ours(
    folder: str, folders: list[str], names: list[str], passed_over: Counter[str]
) -> tuple[list[str], list[str]]:
    """Leave out what our own commands have written, and count it.

    Images that we drew are recognised later, when their headers are read.
    """
    start = len(folder.rstrip(os.sep)) + 1
    own = own_names(folder, {*names, *(path[start:] for path in folders)})
    index = {name for name in names if name.endswith(".parquet") and is_index(Path(folder, name))}
    for kind, found in (("parts of stores and runs", own), ("tables of export-index", index - own)):
        if found:
            passed_over[kind] += len(found)
    if not (own or index):
        return folders, names
    folders = [path for path in folders if path[start:] not in own]
    return folders, [name for name in names if name not in own | index]


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError:  # a link to itself
        return "broken links"
    return "broken links" if entry.is_symlink() else "other files"  # a pipe, a socket, a device


def image_files(folder: Path) -> list[Path]:
    """All files with an image suffix in a folder and its subfolders, sorted."""
    folders = walk(folder, Counter())
    return sorted(Path(at, name) for at, names in folders for name in names if is_image(name))
