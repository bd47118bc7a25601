"""One source of any kind as a stream of records: files below a folder, members, rows of a table."""

import errno
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from stat import S_ISREG

from xlsd_cache.archives.members import printable
from xlsd_cache.archives.reader import read_members
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import CAPTION_BYTES, TOO_LARGE, Beside, Column, LeftOut
from xlsd_cache.files.folders import walk
from xlsd_cache.files.table_cells import cell_sizes
from xlsd_cache.files.uri import GZIPPED, Stat, cell
from xlsd_cache.runtime.bounded_files import open_regular
from xlsd_cache.sources.allowed_folders import Fence, Outside
from xlsd_cache.tables.arrow_tables import arrow_files, holds_images
from xlsd_cache.tables.columns import EMBEDDING, is_table, normal_path, of_kind
from xlsd_cache.tables.row_outcomes import Table
from xlsd_cache.tables.rows import UNREADABLE, read_rows
from xlsd_cache.tables.text_tables import holds_rows

TAR_SUFFIXES = (".tar", *GZIPPED)
ARCHIVE_SUFFIXES = (*TAR_SUFFIXES, ".zip")


@dataclass(frozen=True, slots=True)
class Record:
    """One image as the scan saw it."""

    key: str  # SOURCE_NAME/path/in/the/source.jpg: stays when the source moves
    source: str  # where its bytes are, for locate.py; empty where no table can hold its name
    stat: Stat  # of a member: its own size, the archive's times
    beside: Beside  # suffix -> content of the file beside it
    reason: str = ""  # of outcomes.REASONS where the scan rejects it already
    detail: str = ""


@dataclass
class Tally:
    """What else a source held, filled while its records are taken."""

    passed_over: Counter[str] = field(default_factory=Counter)  # neither images nor captions
    damaged: list[str] = field(default_factory=list)  # a sentence for each file read in part
    tables: list[Table] = field(default_factory=list)  # of which captions are asked
    unread: list[Path] = field(default_factory=list)  # tables that could not be read
    outside: list[Outside] = field(default_factory=list)  # complete once all records are read
    links: list[tuple[Path, list[str]]] = field(default_factory=list)  # of folders, to elsewhere
    fence: Fence = field(default_factory=lambda: Fence(()))  # of what rows may name

    def notes(self) -> list[str]:
        """Sentences on what is read that lies elsewhere than the source that names it."""
        told = [told for it in self.outside if (told := it.told())]
        for root, links in self.links:
            if links:
                some = ", ".join(links[:3]) + (", ..." if len(links) > 3 else "")
                told.append(f"{root}: {len(links)} links lead outside it and are followed: {some}")
        return told

    def add(self, table: Table, search: "Search") -> None:
        """Keep a table whose rows are asked for."""
        if search.columns:
            self.tables.append(table)
            if table.rows.damage:
                damage = f"{table.rows.file} is damaged: {table.rows.damage}; the rest is used"
                self.damaged.append(damage)


@dataclass(frozen=True)
class Search:
    """What to look for: which names give records, and which suffixes may be asked of `beside`.

    Of a sample of several images, one is meant by `image_suffixes`, as of 0.image.jpg and
    0.mask.png by `image.jpg`; what stands beside it is then called 0.txt.
    """

    is_wanted: Callable[[str], bool]
    suffixes: frozenset[str]
    columns: tuple[Column, ...] = ()  # of tables' rows
    images: bool = True  # whether those that tables hold are searched for as well
    image_suffixes: tuple[str, ...] = ()  # none: whatever is_wanted

    @property
    def tables(self) -> bool:
        """Whether rows are asked for as well."""
        return bool(self.columns)

    def is_image(self, name: str) -> bool:
        """Whether a file of this name gives a record."""
        if not self.image_suffixes:
            return self.is_wanted(name)
        return name.lower().endswith(self._ends)

    def stem(self, name: str) -> str:
        """What the names of all files beside an image begin with, up to a dot."""
        for end in self._ends:
            if name.lower().endswith(end):
                return name[: -len(end)]
        folder, slash, file = name.rpartition("/")
        return f"{folder}{slash}{file.rpartition('.')[0] or file}"

    def is_caption(self, name: str) -> bool:
        """Whether the name ends like a caption asked for."""
        return any(name.endswith(f".{suffix}") for suffix in self.suffixes)

    def what_else(self, name: str) -> str:
        """What a file is that is neither an image to be taken nor a caption."""
        return "other images" if self.image_suffixes and self.is_wanted(name) else "other files"

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(f".{suffix}".lower() for suffix in self.image_suffixes)


def folder_records(name: str, root: Path, search: Search, tally: Tally) -> Iterator[Record]:
    """Every file below `root` that is searched for; tars among them are read in place.

    A zip in a folder is somebody's backup as likely as a source: it must be named itself.
    """
    start = len(str(root).rstrip("/\\")) + 1
    links: list[str] = []
    tally.links.append((root, links))
    for folder, files in walk(root, tally.passed_over, links):
        there = Names(files)
        tables = _tables(files, search)
        inside = f"{name}/{folder[start:]}".rstrip("/").replace(os.sep, "/")
        for file in files:
            path = f"{folder}{os.sep}{file}"
            if search.is_image(file):
                try:
                    stat = Stat.of(Path(path).stat())
                except FileNotFoundError:  # deleted while we were looking: it was never there
                    continue
                beside = partial(_beside, folder, there, search.stem(file), _anywhere)
                source = path if _is_utf8(path) else ""
                key = printable(f"{inside}/{file}")
                yield Record(key, source, stat, beside)
            elif file.endswith(TAR_SUFFIXES):
                yield from archive_records(f"{inside}/{file}", Path(path), search, tally)
            elif file in tables and (table := _table(Path(path), inside, files, search, tally)):
                if search.images and table.names_images:
                    yield from row_records(table, tally)
            elif not search.is_caption(file):
                tally.passed_over[search.what_else(file)] += 1


def archive_records(name: str, archive: Path, search: Search, tally: Tally) -> Iterator[Record]:
    """Every member that is searched for; what stands beside one is what shares its stem.

    An archive that cannot be read, or holds nothing, is told in `tally.damaged`.
    """
    try:
        stat = Stat.of(archive.stat())
        found = read_members(archive, search)
    except (UserError, OSError) as error:
        tally.damaged.append(str(error))
        return
    if found.damage:
        told = f"{archive} is damaged: {found.damage}; what is whole before that is used"
        tally.damaged.append(told)
    tally.damaged += [f"{archive}: {remark}" for remark in found.remarks]
    tally.passed_over.update(found.passed_over)
    there = Names(found.texts)
    for member in found.members:
        beside = partial(_member_beside, found.texts, there, search.stem(member.name))
        source = member.source if _is_utf8(member.source) else ""
        key = printable(f"{name}/{member.name}")
        own = stat._replace(size=member.size)
        yield Record(key, source, own, beside, member.reason, member.detail)


class Names:
    """The names in a folder or archive, found in whatever way their letters are composed.

    macOS has accents as characters of their own (NFD), most else has not (NFC).
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._composed = {_composed(n): n for n in self._names if not n.isascii()}

    def find(self, name: str) -> str | None:
        """The name as it is there: letter for letter, or else composed otherwise."""
        if name in self._names:
            return name
        return None if name.isascii() else self._composed.get(_composed(name))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def given_table(name: str, file: Path, search: Search, tally: Tally) -> Table | None:
    """The rows of a source that is a table; None, which the tally says, where it is unreadable."""
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
    """Which files of a folder may be tables: not the .json that is about the image beside it."""
    named = {file for file in files if is_table(file)}
    if any(file.endswith(".json") for file in named):
        named -= {f"{search.stem(file)}.json" for file in files if search.is_image(file)}
    return named


def _table(file: Path, inside: str, files: list[str], search: Search, tally: Tally) -> Table | None:
    """A table found in a folder; None for a file that is none, and for one that asks nothing."""
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
        told = error if isinstance(error, UserError) else f"cannot read {file}: {error}"
        tally.damaged.append(f"{told}; it is left out")
        tally.unread.append(file)
        return None
    if name.endswith(".json") and not any(t.null_count < len(t) for t in rows.captions.values()):
        return None  # somebody's settings
    table = Table(rows, rows.folder.as_posix(), inside)
    tally.add(table, search)
    return table


def row_records(table: Table, tally: Tally) -> Iterator[Record]:
    """The images that a table's cells hold, and the image files that its other rows name."""
    rows = table.rows
    if rows.cell:
        yield from _cell_records(table, rows.cell, tally)
    fence, outside = tally.fence.with_table(rows.file), Outside(rows.file)
    tally.outside.append(outside)
    own = Fence(()).with_table(rows.file)
    start = len(str(rows.folder).rstrip("/\\")) + 1
    named = rows.path.drop_null()
    once = named.unique()
    if len(once) < len(named):
        tally.passed_over["named twice"] += len(named) - len(once)
    for written in once.to_pylist():
        path = normal_path(rows.folder, written)
        status = _file_status(path)
        if status is None and "\\" in path:
            path = normal_path(rows.folder, written.replace("\\", "/"))
            status = _file_status(path)
        if status is None:
            tally.passed_over["named but not there"] += 1
            continue
        if not own.holds(path):
            outside.rows += 1
            if not (fence.allow_outside or fence.holds(path)):
                outside.refuse(written)
                continue
            outside.folders[path.rpartition(os.sep)[0] or os.sep] += 1
        inside = Path(path).is_relative_to(rows.folder)
        key = f"{table.own_place}/{path[start:] if inside else path.lstrip('/')}"
        folder, _, file = path.rpartition(os.sep)
        within = partial(_may_read, fence, outside)
        beside = partial(_beside, folder, None, Path(file).stem, within)
        yield Record(key.replace(os.sep, "/"), path, Stat.of(status), beside)


def _may_read(fence: Fence, outside: Outside, path: str) -> bool:
    """Whether a caption is to be read; one that is a link to elsewhere is counted."""
    if fence.allow_outside or fence.holds(path):
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
            yield Record(key, source, stat._replace(size=size), _nothing)
        elif table.rows.path[row].as_py() is None:
            tally.passed_over["rows without an image"] += 1


def _beside(
    folder: str,
    there: Names | None,
    stem: str,
    within: Callable[[str], bool],
    suffix: str,
) -> bytes | LeftOut | None:
    """`there` are the names in the folder, where they are known: most questions need no disk."""
    wanted = f"{stem}.{suffix}"
    if there is not None:
        found = there.find(wanted)
        return None if found is None else _read_caption(f"{folder}{os.sep}{found}")
    composed = unicodedata.normalize("NFD", wanted), _composed(wanted)
    tried = [wanted] if wanted.isascii() else dict.fromkeys([wanted, *composed])
    paths = (f"{folder}{os.sep}{name}" for name in tried)
    texts = (_read_caption(path) for path in paths if os.path.lexists(path) and within(path))
    return next((text for text in texts if text is not None), None)


def _anywhere(path: str) -> bool:
    del path  # of a folder that the user named, links are followed
    return True


def _read_caption(path: str) -> bytes | LeftOut | None:
    """The content, or None where no file is."""
    try:
        with open_regular(path, buffered=False) as file:
            data = file.read(CAPTION_BYTES + 1)
        return TOO_LARGE if len(data) > CAPTION_BYTES else data
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR, errno.ENXIO):  # a pipe, a folder, a socket
            return None
        raise UserError(
            f"cannot read the caption {path}: {error.strerror}; mend or remove it"
        ) from error


def _member_beside(
    texts: dict[str, bytes | LeftOut], there: Names, stem: str, suffix: str
) -> bytes | LeftOut | None:
    name = there.find(f"{stem}.{suffix}")
    return None if name is None else texts[name]


def _nothing(suffix: str) -> bytes | None:
    del suffix  # a cell has no files beside it
    return None


def _is_utf8(text: str) -> bool:
    return printable(text) == text
