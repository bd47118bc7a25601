"""The image that each table row was matched with, how it was found, and the summary of all rows."""

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.files.table_cells import read_cell
from xlsd_cache.runtime.arrow import Ints
from xlsd_cache.runtime.bounded_files import read_regular
from xlsd_cache.tables.columns import Rows
from xlsd_cache.tables.names import joined

NO_IMAGE, SEVERAL = -1, -2  # in place of an image's number
OWN_BYTES = 2**30  # limit of an image that is read to compare it with the store's
_SHOWN = 20  # tables that get a line of their own in the summary


class MatchKind(IntEnum):
    """How a row named its image, the most exact first; see matching.py."""

    PATH = 0
    KEY = 1
    URL = 2
    MOVED = 3  # by the image's key, where its source was moved after the build
    INSIDE = 4
    FORMER = 5
    NAME = 6


@dataclass(frozen=True)
class Table:
    """The rows of a table, and the images that they may describe."""

    rows: Rows
    folder: str  # its relative paths start from here
    place: str = ""  # prefix of the keys of images in that folder: SOURCE/path/in/it
    given: bool = False  # a source of its own, not a file found in a folder
    sidecars: bool = False  # each row is a file named like the image next to it

    @property
    def names_images(self) -> bool:
        """Whether the images that it has or names belong to the folder it was found in."""
        return self.rows.cell is not None or self.rows.stored

    @property
    def own_place(self) -> str:
        """Prefix of the keys of the images that the table embeds."""
        return self.place if self.given else f"{self.place}/{self.rows.file.name}"

    @property
    def is_doubtful(self) -> bool:
        """Whether the file may be no table at all."""
        return not self.given and self.rows.file.suffix == ".json"

    @property
    def depth(self) -> int:
        """Depth of its folder: of two tables about one image, the deeper counts."""
        return self.folder.count("/")


@dataclass
class Matches:
    """The image of each row of all tables, one table's rows after the other's."""

    tables: list[Table]
    starts: Ints  # first row of each table, and the end of the last
    image: Ints  # number of the image, NO_IMAGE or SEVERAL
    kind: NDArray[np.int8]  # MatchKind, where there is an image
    path: pa.Array  # absolute, as the row names it, or null
    key: pa.Array

    def counts(self, table: int) -> tuple[int, int, int]:
        """Number of a table's rows that are used, match no image, and match several."""
        image = self.image[self.starts[table] : self.starts[table + 1]]
        used, several = int((image >= 0).sum()), int((image == SEVERAL).sum())
        return used, len(image) - used - several, several

    def names(self, table: int, wanted: int) -> list[str]:
        """Names of the first three rows that match NO_IMAGE, or SEVERAL."""
        start, stop = self.starts[table], self.starts[table + 1]
        at = np.flatnonzero(self.image[start:stop] == wanted)[:3]
        rows = self.tables[table].rows
        names = pc.coalesce(rows.path, rows.key, rows.url, rows.id)
        return [name or "a row without a name" for name in names.take(pa.array(at)).to_pylist()]

    def own_image(self, row: int, key: str) -> bytes | None:
        """The bytes of the image that a row names itself, whose suffix is that of `key`, if any."""
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        rows, at = self.tables[number].rows, row - int(self.starts[number])
        try:
            if rows.cell and rows.labels is not None and rows.labels[at].is_valid:
                return read_cell(str(rows.file), rows.cell, at)
            path = self.path[row].as_py() or self.key[row].as_py() + Path(key).suffix
            return read_regular(path, OWN_BYTES)
        except (OSError, ValueError):
            return None

    def texts(self, column: str) -> pa.Array:
        """A column's captions, aligned with the rows of all tables."""
        return joined([t.rows.captions.get(column, pa.nulls(len(t.rows), pa.string()))
                       for t in self.tables])  # fmt: skip

    def without_image(self, column: str) -> int:
        """Number of a column's texts that match no image."""
        texts = self.texts(column)
        return int(((self.image < 0) & texts.is_valid().to_numpy(zero_copy_only=False)).sum())

    def missing(self) -> pa.Array:
        """Mask of the rows whose path or key names no image, or only one by its file name."""
        by_name = pc.and_(pa.array(self.kind == MatchKind.NAME), pc.is_valid(self.path))
        unmatched = pa.array(self.image < 0)
        named = pc.or_(pc.is_valid(self.path), pc.is_valid(self.key))
        return pc.and_(named, pc.or_(unmatched, by_name))

    def moved(self) -> Ints:
        """The rows whose image was found by its key alone."""
        return np.flatnonzero((self.image >= 0) & (self.kind == MatchKind.MOVED))

    def summary(self) -> list[str]:
        """A line per table: how many rows are used, and names of rows that are not."""
        numbers = [n for n, table in enumerate(self.tables) if not table.sidecars]
        # A .json file found in a folder, of which no row matches an image, is something else.
        numbers = [n for n in numbers if self.counts(n)[0] or not self.tables[n].is_doubtful]
        lines = []
        for number in numbers[:_SHOWN]:
            used, unused, several = self.counts(number)
            line = (
                f"{self.tables[number].rows.file.name}: {used + unused + several} rows, {used} used"
            )
            for count, wanted, what in (
                (unused, NO_IMAGE, "of no image"),
                (several, SEVERAL, "match several images"),
            ):
                names = self.names(number, wanted)
                more = ", ..." if count > len(names) else ""
                line += f", {count} {what}: {', '.join(names)}{more}" if count else ""
            lines.append(line)
        if rest := numbers[_SHOWN:]:
            sums = np.sum([self.counts(number) for number in rest], axis=0).tolist()
            used, unused, several = sums
            lines.append(
                f"{len(rest)} more tables: {sum(sums)} rows, {used} used, {unused} of no image, "
                f"{several} match several images"
            )
        return lines
