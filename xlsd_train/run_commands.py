"""One frozen dataclass for each command that is about runs; their command lines are generated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from xlsd_cache import UserError


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page about a run, or about several side by side; it needs nothing else.

    Settings, loss, learning rate, validation, speed and samples, as far as a run has come: also of
    one that is going on, or was killed.
    """

    runs: Positional[tuple[Path, ...]]
    """The folders of runs."""

    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """The page, .html. Default: RUN/report.html for one run, else report.html."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before a log is read."""
        if not self.runs:
            raise UserError("no run is named; give the folder of one or several")
        if self.out is not None and (self.out.suffix != ".html" or self.out.is_dir()):
            raise UserError(f"--out {self.out} is no name of a page; let it end in .html")
