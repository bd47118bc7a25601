"""What became of each row of the tables: its image, how that was found, and what is said of it."""

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

NOBODY, SEVERAL = -1, -2  # in place of an image's number
OWN_BYTES = 2**30  # of an image that is compared with the store's
_SHOWN = 20  # tables that get a line of their own


class How(IntEnum):
    """How a row named its image, the most exact first."""

    PATH = 0
    KEY = 1
    URL = 2
    MOVED = 3  # by the image's key: its source lay elsewhere when the store was built
    INSIDE = 4
    FORMER = 5
    NAME = 6


@dataclass(frozen=True)
class Table:
    """Rows, and what they may speak for."""

    rows: Rows
    folder: str  # what its paths start from
    place: str = ""  # what begins the keys of images in that folder: SOURCE/path/in/it
    given: bool = False  # named by the user, as a source of its own, and not found in a folder
    sidecars: bool = False  # the rows are files, each named like the image beside it

    @property
    def names_images(self) -> bool:
        """Whether its images are images of the folder that it was found in."""
        return self.rows.cell is not None or self.rows.stored

    @property
    def own_place(self) -> str:
        """What begins the keys of the images that the table embeds."""
        return self.place if self.given else f"{self.place}/{self.rows.file.name}"

    @property
    def maybe(self) -> bool:
        """Whether the file may be no table at all."""
        return not self.given and self.rows.file.suffix == ".json"

    @property
    def depth(self) -> int:
        """Of two tables about one image, the nearer counts."""
        return self.folder.count("/")


@dataclass
class Matches:
    """What became of each row of all tables, one table's rows after the other's."""

    tables: list[Table]
    starts: Ints  # of each table's rows, and their end
    image: Ints  # number of the image, NOBODY or SEVERAL
    how: NDArray[np.int8]  # of How, where there is an image
    path: pa.Array  # absolute, as the row names it, or null
    key: pa.Array

    def counts(self, table: int) -> tuple[int, int, int]:
        """How many of a table's rows are used, are of no image, and of several."""
        image = self.image[self.starts[table] : self.starts[table + 1]]
        used, several = int((image >= 0).sum()), int((image == SEVERAL).sum())
        return used, len(image) - used - several, several

    def names(self, table: int, wanted: int, most: int = 3) -> list[str]:
        """What some rows without an image (NOBODY), or with SEVERAL, are called."""
        start, stop = self.starts[table], self.starts[table + 1]
        at = np.flatnonzero(self.image[start:stop] == wanted)[:most]
        rows = self.tables[table].rows
        names = pc.coalesce(rows.path, rows.key, rows.url, rows.id)
        return [name or "a row without a name" for name in names.take(pa.array(at)).to_pylist()]

    def own_image(self, row: int, key: str) -> bytes | None:
        """The image that a row was written for, called like `key`, if it lies with the table."""
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
        """How many texts of a column no image gets."""
        texts = self.texts(column)
        return int(((self.image < 0) & texts.is_valid().to_numpy(zero_copy_only=False)).sum())

    def missing(self) -> pa.Array:
        """Which rows name an image by path or key that is not there."""
        by_name = pc.and_(pa.array(self.how == How.NAME), pc.is_valid(self.path))
        unmatched = pa.array(self.image < 0)
        named = pc.or_(pc.is_valid(self.path), pc.is_valid(self.key))
        return pc.and_(named, pc.or_(unmatched, by_name))

    def moved(self) -> Ints:
        """The rows whose image is told by its key alone."""
        return np.flatnonzero((self.image >= 0) & (self.how == How.MOVED))

    def told(self) -> list[str]:
        """What became of the rows, a line a table, and names of those that no image gets."""
        numbers = [n for n, table in enumerate(self.tables) if not table.sidecars]
        # A .json file that a folder holds, and no row of which names an image, is something else.
        numbers = [n for n in numbers if self.counts(n)[0] or not self.tables[n].maybe]
        lines = []
        for number in numbers[:_SHOWN]:
            used, unused, several = self.counts(number)
            line = (
                f"{self.tables[number].rows.file.name}: {used + unused + several} rows, {used} used"
            )
            for count, wanted, what in (
                (unused, NOBODY, "of no image"),
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
