"""A model's file or folder appears when all of it is there, and what lies beside it before it."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path

import psutil

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import TEMPORARY, fsync_file, fsync_folder, write_bytes


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, it becomes `out`, durably and whole."""
    if out.is_symlink() and out.is_dir():  # which a user has made
        out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{escape(out.name)}.*{TEMPORARY}"):  # by a killed export
        pid = left.name.removeprefix(f".{out.name}.").removesuffix(TEMPORARY)
        if re.fullmatch("[0-9]{1,9}", pid) and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    temporary = out.with_name(f".{out.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        for path in [temporary, *temporary.rglob("*")]:
            fsync_folder(path) if path.is_dir() else fsync_file(path)
        if out.is_dir():
            out.rmdir()  # it is empty
        temporary.rename(out)
        fsync_folder(out.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


@contextmanager
def withdrawing(files: list[Path]) -> Iterator[None]:
    """Where the block fails, these go again: what was to lie beside a model that never appeared."""
    try:
        yield
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise


def write_beside(folder: Path, files: Mapping[str, bytes], written: list[Path]) -> None:
    """Write small files durably, each noted before it is there."""
    for name, data in files.items():
        written.append(folder / name)
        write_bytes(folder / name, data)


def missing_config(out: Path, config: str | None) -> str | None:
    """What is to be written as NAME.yaml, None where it is there. Raises UserError for another one.

    Other programs would read that one with this model, whatever it predicts.
    """
    path = out.with_suffix(".yaml")
    if not path.exists():
        return config
    if config is None or path.read_bytes() != config.encode():
        raise UserError(
            f"{path} exists already, and A1111 and Forge would read it as {out.name}'s: remove it "
            f"or name another file"
        )
    return None
