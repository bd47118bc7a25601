"""Limits the files that rows may name to the table's folder and the folders given as sources.

Rows are untrusted: by `../`, an absolute path or a link they may name any file of the machine,
whose picture and caption would become part of the store.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_SHOWN = 3  # names in a sentence


@dataclass
class AllowedFolders:
    """The folders in which rows may name files, links resolved."""

    folders: tuple[str, ...]
    allow_outside: bool = False
    _known: dict[str, bool] = field(default_factory=dict)  # folder -> whether it is allowed

    @classmethod
    def of_sources(cls, sources: list[Path], *, allow_outside: bool) -> "AllowedFolders":
        """The folders among the sources."""
        folders = [_real(source) for source in sources if source.is_dir()]
        return cls(tuple(folders), allow_outside)

    def with_table(self, file: Path) -> "AllowedFolders":
        """With the folder of a table and, if the table is a link, of its target.

        The hub's cache has links in one folder to files in another.
        """
        own = (_real(file.parent), str(Path(_real(file)).parent))
        return AllowedFolders((*own, *self.folders), self.allow_outside)

    def holds(self, path: str) -> bool:
        """Whether the file is in one of the folders, with links followed."""
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
class OutsideFiles:
    """The files outside a table's folder that its rows name."""

    table: Path
    rows: int = 0
    refused: int = 0
    captions: list[str] = field(default_factory=list)  # refused links next to images
    folders: Counter[str] = field(default_factory=Counter)  # of files that are read
    names: list[str] = field(default_factory=list)  # of files that are refused

    def note(self) -> str:
        """A sentence on the files that are read; empty if there are none."""
        read = self.rows - self.refused
        if not read:
            return ""
        most = [folder for folder, _ in self.folders.most_common(_SHOWN)]
        more = ", ..." if len(self.folders) > _SHOWN else ""
        return (
            f"{self.table.name}: {read} rows name files outside {self.table.parent}; they are read "
            f"from {', '.join(most)}{more}"
        )

    def refusal(self) -> str:
        """A sentence on the files that are refused; empty if there are none."""
        if not (self.refused or self.captions):
            return ""
        facts = []
        if self.refused:
            named = ", ".join(self.names) + (", ..." if self.refused > len(self.names) else "")
            facts.append(f"{self.refused} rows name files outside its folder ({named})")
        if self.captions:
            facts.append(f"{len(self.captions)} captions are links to outside its folder")
        return (
            f"{self.table}: {' and '.join(facts)}; they are not read. Add their folder "
            f"to the sources, or use --allow-outside"
        )

    def refuse(self, name: str) -> None:
        """Count a row that is refused."""
        self.refused += 1
        if len(self.names) < _SHOWN:
            self.names.append(name)


def _real(path: str | Path) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a loop of links; a NUL
        return os.fspath(path)
