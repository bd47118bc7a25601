"""Atomic, durable writes: a temporary file, fsync, rename, fsync of the folder.

After a kill or a power loss at any moment, a path has either its old content or its new content,
complete. Without the fsync, a power loss may leave an empty file under the new name.
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

TEMPORARY = ".tmp"  # suffix of temporary files, by which a later run finds leftovers
_SUM, _UNKNOWN = b"crc32c=", b"________"
HOST = socket.gethostname().partition(".")[0] or "host"


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def temporary_path(folder: Path, name: str) -> Path:
    """A path that no other process uses, and that `sweep` recognises."""
    owner = f"{uuid.uuid4().hex[:8]}.{HOST}.{os.getpid()}"
    return folder / f"{name}.{owner}{TEMPORARY}"


@contextmanager
def replacing(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write, which replaces `path` when the block succeeds.

    The temporary file is in `staging` (on the same file system) or, by default, next to `path`.
    Raises OSError if `staging` is a link, which would redirect the write.
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
    """Yield a path at which to create a folder, or a file. It becomes `path` on success.

    All files are synced before the rename. An empty folder at `path` is replaced; another one
    raises OSError. Leftovers of killed processes for the same `path` are removed first.
    """
    if path.is_symlink() and path.is_dir():  # made by the user: write to the folder it points to
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
    """Hard-link `source` as `target`, or copy it where the file system cannot link."""
    try:
        os.link(source, target)
    except OSError:
        with replacing(Path(target)) as temporary:
            shutil.copyfile(source, temporary)


def write_bytes(path: Path, data: bytes, staging: Path | None = None) -> None:
    """Write `data` to `path` atomically."""
    with replacing(path, staging) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any, staging: Path | None = None) -> None:
    """Write `value` to `path` atomically as indented JSON, with paths as strings."""
    options: dict[str, Any] = {"indent": 2, "allow_nan": False, "default": os.fspath}
    try:
        data = json.dumps(value, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:  # file names that are not valid text, which POSIX allows
        data = json.dumps(value, **options).encode()
    write_bytes(path, data + b"\n", staging)


def write_parquet(path: Path, table: pa.Table, staging: Path | None = None) -> None:
    """Write `table` to `path` atomically as zstd-compressed parquet.

    Its metadata has a crc32c of the whole file, so that `is_whole` detects any flipped bit:
    parquet's own checksums do not cover headers and footers.
    """
    with replacing(path, staging) as temporary:
        with pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"xlsd.checksum": (_SUM + _UNKNOWN).decode()})
        crc, at = _checksum(temporary)
        fill_in(temporary, at, b"%08x" % crc)


def fill_in(path: Path, at: int, digest: bytes) -> None:
    """Write a file's digest over a placeholder of the same length at the byte offset `at`."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(digest)


def is_whole(path: Path) -> bool:
    """Whether a file has exactly the bytes that `write_parquet` wrote. Raises OSError."""
    try:
        crc, at = _checksum(path)
    except ValueError:  # empty, or without a checksum
        return False
    with open_regular(path) as file:
        file.seek(at)
        return file.read(len(_UNKNOWN)) == b"%08x" % crc


def _checksum(path: Path) -> tuple[int, int]:
    """The crc32c of a parquet file without its checksum, and the checksum's byte offset.

    Raises ValueError for a file without a checksum.
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
    """Remove temporary files of dead processes, and those of other machines after a day."""
    for path in folder.glob(f"*{TEMPORARY}"):
        owner = re.search(r"\.[0-9a-f]{8}\.([^.]+)\.([0-9]{1,9})\.tmp$", path.name)
        if not owner or path.is_dir():  # another program's
            continue
        dead = owner[1] == HOST and not psutil.pid_exists(int(owner[2]))
        try:
            if dead or time.time() - path.stat().st_mtime > 86400:
                path.unlink()
        except FileNotFoundError:  # another process removed it
            continue
