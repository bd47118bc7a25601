"""The runs of a live page: those given, and those that appear in a given folder of runs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xlsd_cache.errors import UserError
from xlsd_train.runs.history import History, RunReader, run_names
from xlsd_train.runs.layout import CONFIG, METRICS_LOG
from xlsd_train.runs.record import read_record


class Runs:
    """Reads runs that go on; each keeps its number, and a deleted one shows what was last read."""

    def __init__(self, given: Sequence[Path]) -> None:
        """Raises UserError for a folder that has no run, or is given twice."""
        run_names(given)
        self._given = list(given)
        self._readers: dict[Path, RunReader] = {}
        self._last: dict[Path, History] = {}
        for folder in given:
            if not _runs_in(folder):
                read_record(folder)  # which says what is wrong
        self.folders: list[Path] = []
        self.read(self.look())

    def look(self) -> list[Path]:
        """The folders of all runs so far; new ones are at the end."""
        found = [run for folder in self._given for run in _runs_in(folder)]
        self.folders += [run for run in dict.fromkeys(found) if run not in self.folders]
        return list(self.folders)

    def read(self, folders: Sequence[Path]) -> list[History]:
        """These runs as they are now. Raises UserError for a run that is damaged."""
        names = run_names(folders)
        return [self._read(folder, name) for folder, name in zip(folders, names, strict=True)]

    def _read(self, folder: Path, name: str) -> History:
        try:
            record = read_record(folder)
        except UserError:
            if folder not in self._last or not is_gone(folder):
                raise
            return replace(self._last[folder], name=name, samples={})
        reader = self._readers.setdefault(folder, RunReader(folder))
        self._last[folder] = reader.read(name, record)
        return self._last[folder]


def is_gone(folder: Path) -> bool:
    """Whether a run was deleted."""
    try:
        return not (folder / CONFIG).exists()
    except OSError:  # e.g. a permission that was taken away: reading it says so
        return False


def _runs_in(folder: Path) -> list[Path]:
    """A run itself, or the runs in a folder of them, e.g. of a sweep, once they log steps."""
    try:
        if (folder / CONFIG).exists():
            return [folder]
        paths = sorted(path for path in folder.iterdir() if not path.is_symlink())
        return [path for path in paths if not is_gone(path) and (path / METRICS_LOG).is_file()]
    except OSError:  # no folder, or one that is being deleted, or may no longer be read
        return []
