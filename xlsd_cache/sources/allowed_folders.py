"""Which files rows may name: those in the table's folder, and in the folders that the user named.

A row is a stranger's word: it may name any file of the machine, by `../`, by its full path or
through a link, and its picture and the caption beside it would become part of the store.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_NAMED = 3  # files that a sentence names


@dataclass
class Fence:
    """The folders that rows may name files in, links resolved."""

    folders: tuple[str, ...]
    allow_outside: bool = False
    _known: dict[str, bool] = field(default_factory=dict)  # folder, as named -> whether within

    @classmethod
    def around(cls, sources: list[Path], *, allow_outside: bool) -> "Fence":
        """The folders among the sources."""
        named = [_real(source) for source in sources if source.is_dir()]
        return cls(tuple(named), allow_outside)

    def with_table(self, file: Path) -> "Fence":
        """Also the folder of a table, and that of the file which it is a link to.

        The hub's cache has links in one folder to files in another.
        """
        own = (_real(file.parent), str(Path(_real(file)).parent))
        return Fence((*own, *self.folders), self.allow_outside)

    def holds(self, path: str) -> bool:
        """Whether the file lies within, wherever its links lead."""
        folder, _, name = path.rpartition(os.sep)
        if folder not in self._known:
            self._known[folder] = self._within(_real(folder) or os.sep)
        if os.path.islink(path):  # noqa: PTH114 - once a row: a Path costs more
            return self._within(str(Path(_real(path)).parent))
        return self._known[folder] and name not in ("", ".", "..")

    def _within(self, real: str) -> bool:
        return any(real == own or real.startswith(own.rstrip(os.sep) + os.sep)
                   for own in self.folders)  # fmt: skip


@dataclass
class Outside:
    """What the rows of one table name that lies elsewhere than in its folder."""

    table: Path
    rows: int = 0
    refused: int = 0
    captions: list[str] = field(default_factory=list)  # links beside images, refused
    folders: Counter[str] = field(default_factory=Counter)  # of what is read
    names: list[str] = field(default_factory=list)  # of what is not

    def told(self) -> str:
        """A sentence on what is read, and empty where nothing is."""
        read = self.rows - self.refused
        if not read:
            return ""
        most = [folder for folder, _ in self.folders.most_common(_NAMED)]
        more = ", ..." if len(self.folders) > _NAMED else ""
        return (
            f"{self.table.name}: {read} rows name files outside {self.table.parent}, which are "
            f"read: in {', '.join(most)}{more}"
        )

    def refusal(self) -> str:
        """A sentence on what is not read, and empty where all is."""
        if not (self.refused or self.captions):
            return ""
        parts = []
        if self.refused:
            named = ", ".join(self.names) + (", ..." if self.refused > len(self.names) else "")
            parts.append(f"{self.refused} rows name files outside its folder ({named})")
        if self.captions:
            parts.append(f"{len(self.captions)} captions are links to outside its folder")
        return (
            f"{self.table}: {' and '.join(parts)}, which are not read; name their folder as a "
            f"source as well, or add --allow-outside"
        )

    def refuse(self, written: str) -> None:
        """Count a row that is left out."""
        self.refused += 1
        if len(self.names) < _NAMED:
            self.names.append(written)


def _real(path: str | Path) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a loop of links; a NUL
        return os.fspath(path)
