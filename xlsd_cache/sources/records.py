"""Lists the images of one source: files below a folder, members of an archive, rows of a table."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from stat import S_ISREG

from xlsd_cache.archives.members import printable
from xlsd_cache.archives.reader import read_members
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column, ReadSidecar
from xlsd_cache.files.folders import walk
from xlsd_cache.files.table_cells import cell_sizes
from xlsd_cache.files.uri import GZIPPED, Stat, cell
from xlsd_cache.sources.allowed_folders import AllowedFolders, OutsideFiles
from xlsd_cache.sources.sidecars import (
    Names,
    anywhere,
    member_sidecar,
    no_sidecar,
    read_sidecar,
)
from xlsd_cache.tables.arrow_tables import arrow_files, holds_images
from xlsd_cache.tables.columns import EMBEDDING, is_table, normal_path, of_kind
from xlsd_cache.tables.row_outcomes import Table
from xlsd_cache.tables.rows import UNREADABLE, read_rows
from xlsd_cache.tables.text_tables import holds_rows

TAR_SUFFIXES = (".tar", *GZIPPED)
ARCHIVE_SUFFIXES = (*TAR_SUFFIXES, ".zip")


@dataclass(frozen=True, slots=True)
class Record:
    """One image, as scanned."""

    key: str  # SOURCE_NAME/path/in/the/source.jpg: stays when the source moves
    source: str  # URI of its bytes, see files/uri.py; empty where its name is not UTF-8
    stat: Stat  # of a member: its own size, the archive's times
    sidecar: ReadSidecar  # suffix -> content of the file next to it
    reason: str = ""  # an outcomes.Reason where the scan rejects it
    detail: str = ""


@dataclass
class Tally:
    """What sources hold besides records; complete once their records have been read."""

    passed_over: Counter[str] = field(default_factory=Counter)  # neither images nor captions
    damaged: list[str] = field(default_factory=list)  # a sentence for each file read in part
    tables: list[Table] = field(default_factory=list)  # those that may have captions
    unread: list[Path] = field(default_factory=list)  # tables that could not be read
    outside: list[OutsideFiles] = field(default_factory=list)  # one for each table
    links: list[tuple[Path, list[str]]] = field(
        default_factory=list
    )  # folder, its links to elsewhere
    allowed: AllowedFolders = field(
        default_factory=lambda: AllowedFolders(())
    )  # for rows of tables

    def notes(self) -> list[str]:
        """A sentence for each source of which files elsewhere are read."""
        notes = [note for table in self.outside if (note := table.note())]
        for root, links in self.links:
            if links:
                some = ", ".join(links[:3]) + (", ..." if len(links) > 3 else "")
                notes.append(f"{root}: {len(links)} links lead outside it and are followed: {some}")
        return notes

    def add(self, table: Table, search: "Search") -> None:
        """Keep a table, if captions in tables are wanted."""
        if search.columns:
            self.tables.append(table)
            if table.rows.damage:
                damage = f"{table.rows.file} is damaged: {table.rows.damage}; the rest is used"
                self.damaged.append(damage)


@dataclass(frozen=True)
class Search:
    """What to look for: names that give records, and suffixes of the files next to them.

    `image_suffixes` selects one of several images of a sample: `image.jpg` takes 0.image.jpg and
    not 0.mask.png, with the caption 0.txt.
    """

    is_wanted: Callable[[str], bool]
    suffixes: frozenset[str]
    columns: tuple[Column, ...] = ()  # caption columns of tables
    images: bool = True  # whether images in tables are wanted as well
    image_suffixes: tuple[str, ...] = ()  # empty: all that is_wanted

    @property
    def tables(self) -> bool:
        """Whether tables are read."""
        return bool(self.columns)

    def is_image(self, name: str) -> bool:
        """Whether a file of this name gives a record."""
        if not self.image_suffixes:
            return self.is_wanted(name)
        return name.lower().endswith(self._ends)

    def stem(self, name: str) -> str:
        """What the names of all files next to an image start with, up to a dot."""
        for end in self._ends:
            if name.lower().endswith(end):
                return name[: -len(end)]
        folder, slash, file = name.rpartition("/")
        return f"{folder}{slash}{file.rpartition('.')[0] or file}"

    def is_caption(self, name: str) -> bool:
        """Whether the name has the suffix of a wanted caption."""
        return any(name.endswith(f".{suffix}") for suffix in self.suffixes)

    def what_else(self, name: str) -> str:
        """The kind of a file that is neither a wanted image nor a caption."""
        return "other images" if self.image_suffixes and self.is_wanted(name) else "other files"

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(f".{suffix}".lower() for suffix in self.image_suffixes)


def folder_records(name: str, root: Path, search: Search, tally: Tally) -> Iterator[Record]:
    """The wanted files below `root`, and those in tars and tables there.

    A zip in a folder may well be a backup, so it is read only if it is given itself.
    """
    start = len(str(root).rstrip("/\\")) + 1
    links: list[str] = []
    tally.links.append((root, links))
    for folder, files in walk(root, tally.passed_over, links):
        names = Names(files)
        tables = _tables(files, search)
        inside = f"{name}/{folder[start:]}".rstrip("/").replace(os.sep, "/")
        for file in files:
            path = f"{folder}{os.sep}{file}"
            if search.is_image(file):
                try:
                    stat = Stat.of(Path(path).stat())
                except FileNotFoundError:  # deleted during the scan
                    continue
                sidecar = partial(read_sidecar, folder, names, search.stem(file), anywhere)
                source = path if _is_utf8(path) else ""
                key = printable(f"{inside}/{file}")
                yield Record(key, source, stat, sidecar)
            elif file.endswith(TAR_SUFFIXES):
                yield from archive_records(f"{inside}/{file}", Path(path), search, tally)
            elif file in tables and (table := _table(Path(path), inside, files, search, tally)):
                if search.images and table.names_images:
                    yield from row_records(table, tally)
            elif not search.is_caption(file):
                tally.passed_over[search.what_else(file)] += 1


def archive_records(name: str, archive: Path, search: Search, tally: Tally) -> Iterator[Record]:
    """The wanted members of an archive; the members with its stem are an image's sidecars.

    `tally.damaged` gets a sentence on an archive that is unreadable, damaged or empty.
    """
    try:
        stat = Stat.of(archive.stat())
        found = read_members(archive, search)
    except (UserError, OSError) as error:
        tally.damaged.append(str(error))
        return
    if found.damage:
        damage = f"{archive} is damaged: {found.damage}; what is intact before that is used"
        tally.damaged.append(damage)
    tally.damaged += [f"{archive}: {remark}" for remark in found.remarks]
    tally.passed_over.update(found.passed_over)
    names = Names(found.texts)
    for member in found.members:
        sidecar = partial(member_sidecar, found.texts, names, search.stem(member.name))
        source = member.source if _is_utf8(member.source) else ""
        key = printable(f"{name}/{member.name}")
        own = stat._replace(size=member.size)
        yield Record(key, source, own, sidecar, member.reason, member.detail)


def given_table(name: str, file: Path, search: Search, tally: Tally) -> Table | None:
    """The rows of a source that is a table; None, with a note in the tally, if unreadable."""
    try:
        rows = read_rows(file, search.columns)
    except UserError as error:
        tally.damaged.append(str(error))
        tally.unread.append(file)
        return None
    table = Table(rows, rows.folder.as_posix(), name, given=True)
    tally.add(table, search)
    return table


def _tables(files: list[str], search: Search) -> set[str]:
    """The files of a folder that may be tables: not a .json about the image next to it."""
    named = {file for file in files if is_table(file)}
    if any(file.endswith(".json") for file in named):
        named -= {f"{search.stem(file)}.json" for file in files if search.is_image(file)}
    return named


def _table(file: Path, inside: str, files: list[str], search: Search, tally: Tally) -> Table | None:
    """A table found in a folder; None for a file that is no table, or has nothing wanted."""
    name = file.name.lower()
    try:
        embeds = name.endswith(EMBEDDING)
        if name.endswith(".arrow") and file.name not in arrow_files(file.parent, files):
            return None
        images = search.images and embeds and holds_images(file)
        if not images and not of_kind(file, search.columns):
            return None
        if name.endswith(".json") and not holds_rows(file):
            return None
        rows = read_rows(file, search.columns)
    except (*UNREADABLE, UserError) as error:
        why = error if isinstance(error, UserError) else f"cannot read {file}: {error}"
        tally.damaged.append(f"{why}; it is left out")
        tally.unread.append(file)
        return None
    if name.endswith(".json") and not any(t.null_count < len(t) for t in rows.captions.values()):
        return None  # some program's settings
    table = Table(rows, rows.folder.as_posix(), inside)
    tally.add(table, search)
    return table


def row_records(table: Table, tally: Tally) -> Iterator[Record]:
    """The images in a table's cells, and the image files that its other rows name."""
    rows = table.rows
    if rows.cell:
        yield from _cell_records(table, rows.cell, tally)
    allowed, outside = tally.allowed.with_table(rows.file), OutsideFiles(rows.file)
    tally.outside.append(outside)
    own = AllowedFolders(()).with_table(rows.file)
    start = len(str(rows.folder).rstrip("/\\")) + 1
    named = rows.path.drop_null()
    once = named.unique()
    if len(once) < len(named):
        tally.passed_over["named twice"] += len(named) - len(once)
    for name in once.to_pylist():
        path = normal_path(rows.folder, name)
        status = _file_status(path)
        if status is None and "\\" in path:
            path = normal_path(rows.folder, name.replace("\\", "/"))
            status = _file_status(path)
        if status is None:
            tally.passed_over["named but not there"] += 1
            continue
        if not own.holds(path):
            outside.rows += 1
            if not (allowed.allow_outside or allowed.holds(path)):
                outside.refuse(name)
                continue
            outside.folders[path.rpartition(os.sep)[0] or os.sep] += 1
        inside = Path(path).is_relative_to(rows.folder)
        key = f"{table.own_place}/{path[start:] if inside else path.lstrip('/')}"
        folder, _, file = path.rpartition(os.sep)
        within = partial(_may_read, allowed, outside)
        sidecar = partial(read_sidecar, folder, None, Path(file).stem, within)
        yield Record(key.replace(os.sep, "/"), path, Stat.of(status), sidecar)


def _may_read(allowed: AllowedFolders, outside: OutsideFiles, path: str) -> bool:
    """Whether a caption may be read; a link to elsewhere is counted and may not."""
    if allowed.allow_outside or allowed.holds(path):
        return True
    outside.captions.append(path)
    return False


def _file_status(path: str) -> os.stat_result | None:
    try:
        status = Path(path).stat()
    except (OSError, ValueError):  # ValueError: a NUL in it
        return None
    return status if S_ISREG(status.st_mode) else None


def _cell_records(table: Table, column: str, tally: Tally) -> Iterator[Record]:
    file = table.rows.file
    stat = Stat.of(file.stat())
    assert table.rows.labels is not None
    labels = table.rows.labels.to_pylist()
    for row, size in enumerate(cell_sizes(file, column)):
        if size and labels[row] is not None:
            source = cell(file, column, row, size, labels[row])
            key = f"{table.own_place}/{labels[row]}"
            yield Record(key, source, stat._replace(size=size), no_sidecar)
        elif table.rows.path[row].as_py() is None:
            tally.passed_over["rows without an image"] += 1


def _is_utf8(text: str) -> bool:
    return printable(text) == text
