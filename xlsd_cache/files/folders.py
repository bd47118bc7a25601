"""Everything below a folder, in one order on every machine, each linked folder entered once."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.own_files import is_index, own_names

# Decoded or not. Not raw camera files, PSD and the like: they lie beside the picture that was made
# of them, and would share its name.
IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe"}
    | {".jpeg", ".jpg", ".jpx", ".jxl", ".mpo", ".pgm", ".png", ".ppm", ".qoi", ".tif", ".tiff"}
    | {".webp"}
)
# The same for Arrow's regular expressions: what ends a file name that is an image's.
SUFFIX_PATTERN = rf"(?i)\.(?:{'|'.join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))})$"
_OF_SYSTEMS = frozenset({"__MACOSX", "@eaDir"})  # of macOS in zips, of Synology's disks


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no content of anybody's: one part of a path."""
    return name in _OF_SYSTEMS or (name.startswith(".") and name not in (".", ".."))


def is_image(name: str) -> bool:
    """Whether the name ends like an image's."""
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in IMAGE_SUFFIXES


def walk(
    root: Path, passed_over: Counter[str], links: list[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files, sorted) of every folder below `root`, `root` first.

    Hidden names are left out and counted, as are broken links, folders linked twice, and what is a
    store's or a run's of ours. Links that lead out of `root` are added to `links`. Raises UserError
    for a folder that cannot be read: what is in it would silently be missing.
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
                f"cannot read the folder {folder}: {error.strerror}; make it readable or "
                f"leave it out, for what is in it would silently be missing"
            ) from error
        folders, names = _without_ours(folder, folders, names, passed_over)
        pending += sorted(folders, reverse=True)
        yield folder, sorted(names)


def _without_ours(
    folder: str, folders: list[str], names: list[str], passed_over: Counter[str]
) -> tuple[list[str], list[str]]:
    """The folders and names of files that no command of ours has written; the others are counted.

    Pictures are told later, when their headers are read.
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
    except OSError:  # a link that leads back to itself
        return "broken links"
    return "broken links" if entry.is_symlink() else "other files"  # a pipe, a socket, a device


def image_files(folder: Path) -> list[Path]:
    """All images of a folder and those in it, by name, in order."""
    found = walk(folder, Counter())
    return sorted(Path(inside, name) for inside, names in found for name in names if is_image(name))
