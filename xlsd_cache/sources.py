"""Folders of images with caption files beside them, as one list of records."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from xlsd_cache import UserError

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".mpo", ".pgm", ".png", ".ppm", ".qoi", ".tif", ".tiff", ".webp"}
)
# The store's own columns of a sample; any other column is a caption.
RESERVED = frozenset(
    ["key", "source", "bucket", "row", "width", "height", "crop", "content_hash", "crc32c"]
)


@dataclass(frozen=True, slots=True)
class Record:
    """One image as the scan saw it."""

    key: str  # SOURCE_NAME/path/in/the/source.jpg: stays when the source folder moves
    path: Path
    size: int  # bytes
    mtime_ns: int
    captions: dict[str, str] = field(default_factory=dict)  # column -> text, missing ones left out

    def read(self) -> bytes:
        """The file's bytes. Raises OSError."""
        return self.path.read_bytes()


@dataclass(frozen=True)
class Scan:
    """Everything found: one record an image, sorted by key, and what was passed over."""

    records: list[Record]
    passed_over: int  # files that are neither images nor captions: not images, not lost


def scan(sources: tuple[str, ...], columns: tuple[str, ...]) -> Scan:
    """All images under the source folders, each with its captions.

    `columns` are sidecar suffixes: column `txt` of `a/b.jpg` is the text of `a/b.txt`.
    Raises UserError for a source that is missing, unreadable, or holds no image.
    """
    records: list[Record] = []
    passed_over = 0
    for name, root in _named_roots(sources).items():
        found = len(records)
        suffixes = tuple(f".{column}" for column in columns)
        for entry in _walk(root):
            path = Path(entry.path)
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                passed_over += not entry.name.endswith(suffixes)
                continue
            try:
                records.append(_record(name, root, path, columns))
            except FileNotFoundError:  # deleted while we were looking: it was never there
                continue
        if len(records) == found:
            raise UserError(
                f"no images in {root}: none of its files ends in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}; name the folder that holds the images"
            )
    records.sort(key=lambda record: record.key)
    return Scan(records, passed_over)


def _named_roots(sources: tuple[str, ...]) -> dict[str, Path]:
    """Each source under its folder's own name, numbered where two share one."""
    roots: dict[str, Path] = {}
    for source in sources:
        root = Path(source).expanduser().absolute()
        if not root.exists():
            raise UserError(f"no folder {source}: nothing is there; name the folder of images")
        if not root.is_dir():
            raise UserError(f"{source} is not a folder; name the folder that holds the image")
        base = name = root.resolve().name or "root"
        number = 2
        while name in roots:
            name, number = f"{base}~{number}", number + 1
        if root.resolve() in (other.resolve() for other in roots.values()):
            raise UserError(f"{source} is named twice; name each source once")
        roots[name] = root
    return roots


def _walk(root: Path) -> Iterator[os.DirEntry[str]]:
    """Files below `root` in name order; hidden ones left out, linked folders entered once."""
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"cannot read the folder {folder}: {error.strerror}; make it readable or "
                f"leave it out, for what is in it would silently be missing"
            ) from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                pending.append(Path(entry.path))
            elif entry.is_file():  # a broken link is neither
                yield entry


def _record(name: str, root: Path, path: Path, columns: tuple[str, ...]) -> Record:
    status = path.stat()
    captions = {}
    for column in columns:
        text = _read_caption(path.with_suffix(f".{column}"))
        if text:
            captions[column] = text
    # A name that is not UTF-8 still needs a key that parquet can hold.
    key = f"{name}/{path.relative_to(root).as_posix()}".encode("utf-8", "backslashreplace").decode()
    return Record(key, path, status.st_size, status.st_mtime_ns, captions)


def _read_caption(path: Path) -> str:
    """The sidecar's text, its lines stripped and blank ones dropped; empty when there is none.

    UTF-8 with or without BOM, UTF-16 with one, else Latin-1, in which every byte is a character.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(
            f"cannot read the caption {path}: {error.strerror}; mend or remove it"
        ) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    lines = (line.strip() for line in text.replace("\0", "").splitlines())
    return "\n".join(line for line in lines if line)
