"""Nothing is written in place: a temporary file, fsync, rename, and the folder synced too.

After a kill at any moment a path holds either its old content or its new, whole. After a power
loss as well: a rename that was not synced may survive with an empty file behind it.
"""

import errno
import json
import mmap
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import google_crc32c
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from xlsd_cache.runtime.bounded_files import open_regular

TEMPORARY = ".tmp"  # the suffix by which a later run knows what a killed one left
_SUM, _UNKNOWN = b"crc32c=", b"________"
HOST = socket.gethostname().partition(".")[0] or "host"


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows has no such call, and needs none."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Force a file's content to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def temporary_path(folder: Path, name: str) -> Path:
    """A path that no other process uses, and that `sweep` knows."""
    mine = f"{uuid.uuid4().hex[:8]}.{HOST}.{os.getpid()}"
    return folder / f"{name}.{mine}{TEMPORARY}"


@contextmanager
def replacing(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write; when the block ends well, it becomes `path`, durably.

    The temporary file lies in `staging` (same file system) or, by default, next to `path`. Raises
    OSError for a `staging` that is a link, which would have it written somewhere else.
    """
    if staging is not None and staging.is_symlink():
        raise OSError(errno.ELOOP, "a link", os.fspath(staging))
    temporary = temporary_path(staging or path.parent, path.name)
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a path to make a folder at, or a file; when the block ends well, it becomes `path`.

    Everything in it is synced before. An empty folder at `path` is replaced, another one raises
    OSError. What killed processes left of the same folder is removed first.
    """
    if path.is_symlink() and path.is_dir():  # made by the user: the folder appears where it leads
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{escape(path.name)}.*{TEMPORARY}"):
        pid = left.name.removeprefix(f".{path.name}.").removesuffix(TEMPORARY)
        if re.fullmatch("[0-9]{1,9}", pid) and not psutil.pid_exists(int(pid)):
            _remove(left)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        for part in (temporary, *temporary.rglob("*")):
            fsync_folder(part) if part.is_dir() else fsync_file(part)
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
        fsync_folder(path.parent)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same content under a second name, taking no space where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        with replacing(Path(target)) as temporary:
            shutil.copyfile(source, temporary)


def write_bytes(path: Path, data: bytes, staging: Path | None = None) -> None:
    """`path` holds `data`, or what it held before."""
    with replacing(path, staging) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any, staging: Path | None = None) -> None:
    """`path` holds `value` as JSON for people: indented, paths as strings."""
    options: dict[str, Any] = {"indent": 2, "allow_nan": False, "default": os.fspath}
    try:
        data = json.dumps(value, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:  # names that are no text, as POSIX allows
        data = json.dumps(value, **options).encode()
    write_bytes(path, data + b"\n", staging)


def write_parquet(path: Path, table: pa.Table, staging: Path | None = None) -> None:
    """`path` holds `table`, zstd-compressed parquet that pandas, polars and duckdb read.

    Its metadata holds a crc32c of the whole file, so that `is_whole` finds any flipped bit:
    parquet's own checksums say nothing of headers and footers.
    """
    with replacing(path, staging) as temporary:
        with pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"xlsd.checksum": (_SUM + _UNKNOWN).decode()})
        crc, at = _checksum(temporary)
        fill_in(temporary, at, b"%08x" % crc)


def fill_in(path: Path, at: int, digest: bytes) -> None:
    """Write a file's digest over the placeholder of the same length that stands at byte `at`."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(digest)


def is_whole(path: Path) -> bool:
    """Whether a file holds the bytes that `write_parquet` wrote, every one. Raises OSError."""
    try:
        crc, at = _checksum(path)
    except ValueError:  # empty, or the checksum itself is gone
        return False
    with open_regular(path) as file:
        file.seek(at)
        return file.read(len(_UNKNOWN)) == b"%08x" % crc


def _checksum(path: Path) -> tuple[int, int]:
    """The crc32c of a parquet file but for its checksum, and where in it that stands.

    Raises ValueError where it stands nowhere.
    """
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.rfind(_SUM) + len(_SUM)
        if at < len(_SUM):
            raise ValueError
        crc = 0
        for first, last in ((0, at), (at + len(_UNKNOWN), len(data))):
            for start in range(first, last, 1 << 24):
                crc = google_crc32c.extend(crc, data[start : min(start + (1 << 24), last)])
        return crc, at


def sweep(folder: Path) -> None:
    """Remove temporary files of processes that no longer run; other machines' after a day."""
    for path in folder.glob(f"*{TEMPORARY}"):
        named = re.search(r"\.[0-9a-f]{8}\.([^.]+)\.([0-9]{1,9})\.tmp$", path.name)
        if not named or path.is_dir():  # somebody else's
            continue
        dead = named[1] == HOST and not psutil.pid_exists(int(named[2]))
        try:
            if dead or time.time() - path.stat().st_mtime > 86400:
                path.unlink()
        except FileNotFoundError:  # another process swept it
            continue
