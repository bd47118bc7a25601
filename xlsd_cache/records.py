"""One source of any kind as a stream of records: files below a folder, members, rows of a table."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from stat import S_ISREG

from xlsd_cache import UserError
from xlsd_cache.archives import read_members
from xlsd_cache.captions import Beside
from xlsd_cache.folders import walk
from xlsd_cache.locate import Stat, cell
from xlsd_cache.tables import Rows, cell_sizes, is_table, normal_path

ARCHIVE_SUFFIXES = (".tar", ".zip")


@dataclass(frozen=True, slots=True)
class Record:
    """One image as the scan saw it."""

    key: str  # SOURCE_NAME/path/in/the/source.jpg: stays when the source moves
    source: str  # where its bytes are, for locate.py; empty where no table can hold its name
    stat: Stat  # of a member: its own size, the archive's times
    beside: Beside  # suffix -> content of the file beside it
    reason: str = ""  # of decode.REASONS where the scan rejects it already
    detail: str = ""


@dataclass
class Tally:
    """What else a source held, filled while its records are taken."""

    passed_over: Counter[str] = field(default_factory=Counter)  # neither images nor captions
    damaged: list[str] = field(default_factory=list)  # a sentence for each file read in part
    tables: list[Path] = field(default_factory=list)  # JSON lines and parquet files in folders


@dataclass(frozen=True)
class Search:
    """What to look for: which names give records, and which suffixes may be asked of `beside`."""

    is_wanted: Callable[[str], bool]
    suffixes: frozenset[str]
    tables: bool  # whether rows of JSON lines and parquet files are asked for as well

    def is_caption(self, name: str) -> bool:
        """Whether the name ends like a caption asked for."""
        return any(name.endswith(f".{suffix}") for suffix in self.suffixes)


def folder_records(name: str, root: Path, search: Search, tally: Tally) -> Iterator[Record]:
    """Every file below `root` that is searched for; tars among them are read in place.

    A zip in a folder is somebody's backup as likely as a source: it must be named itself.
    """
    start = len(str(root).rstrip("/\\")) + 1
    for folder, files in walk(root, tally.passed_over):
        there = frozenset(files)
        inside = f"{name}/{folder[start:]}".rstrip("/").replace(os.sep, "/")
        for file in files:
            path = f"{folder}{os.sep}{file}"
            if search.is_wanted(file):
                try:
                    stat = Stat.of(Path(path).stat())
                except FileNotFoundError:  # deleted while we were looking: it was never there
                    continue
                beside = partial(_beside, folder, there, _stem(file))
                source = path if _is_utf8(path) else ""
                key = _printable(f"{inside}/{file}")
                yield Record(key, source, stat, beside)
            elif file.endswith(".tar"):
                yield from archive_records(f"{inside}/{file}", Path(path), search, tally)
            elif search.tables and is_table(file):
                tally.tables.append(Path(path))
            elif not search.is_caption(file):
                tally.passed_over["other files"] += 1


def archive_records(name: str, archive: Path, search: Search, tally: Tally) -> Iterator[Record]:
    """Every member that is searched for; what stands beside one is what shares its stem."""
    stat = Stat.of(archive.stat())
    found = read_members(archive, search.is_wanted, search.is_caption)
    if found.damage:
        tally.damaged.append(f"{archive} is damaged: {found.damage}; all before that is used")
    if found.others:
        tally.passed_over["other files"] += found.others
    for member in found.members:
        beside = partial(_member_beside, found.texts, _stem(member.name))
        source = member.source if _is_utf8(member.source) else ""
        key = _printable(f"{name}/{member.name}")
        yield Record(key, source, stat._replace(size=member.size), beside)


def row_records(name: str, rows: Rows, tally: Tally) -> Iterator[Record]:
    """The image files that a table's rows name, or the images that its cells hold."""
    if rows.cell:
        yield from _cell_records(name, rows, rows.cell, tally)
        return
    start = len(str(rows.folder).rstrip("/\\")) + 1
    for written in rows.path.to_pylist():
        if written is None:
            continue
        path = normal_path(rows.folder, written)
        try:
            status = Path(path).stat()
        except (OSError, ValueError):  # ValueError: a NUL in it
            status = None
        if status is None or not S_ISREG(status.st_mode):
            tally.passed_over["named but not there"] += 1
            continue
        inside = Path(path).is_relative_to(rows.folder)
        key = f"{name}/{path[start:] if inside else path.lstrip('/')}".replace(os.sep, "/")
        folder, _, file = path.rpartition(os.sep)
        beside = partial(_beside, folder, None, _stem(file))
        yield Record(key, path, Stat.of(status), beside)


def _cell_records(name: str, rows: Rows, column: str, tally: Tally) -> Iterator[Record]:
    stat = Stat.of(rows.file.stat())
    labels = rows.path.to_pylist()
    for row, size in enumerate(cell_sizes(rows.file, column)):
        if not size:
            tally.passed_over["rows without an image"] += 1
            continue
        source = cell(rows.file, column, row, size, labels[row])
        yield Record(f"{name}/{labels[row]}", source, stat._replace(size=size), _nothing)


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.rpartition('.')[0] or file}"


def _beside(folder: str, there: frozenset[str] | None, stem: str, suffix: str) -> bytes | None:
    """`there` are the names in the folder, where they are known: most questions need no disk."""
    name = f"{stem}.{suffix}"
    if there is not None and name not in there:
        return None
    path = Path(folder) / name
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"cannot read the caption {path}: {error.strerror}; mend or remove it"
        ) from error


def _member_beside(texts: dict[str, bytes], stem: str, suffix: str) -> bytes | None:
    return texts.get(f"{stem}.{suffix}")


def _nothing(suffix: str) -> bytes | None:
    del suffix  # a cell has no files beside it
    return None


def _is_utf8(text: str) -> bool:
    return _printable(text) == text


def _printable(text: str) -> str:
    """A name that is not UTF-8 still needs a key that parquet can hold."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
