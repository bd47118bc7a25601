"""The samples of runs, as thumbnails for the page's timeline; the originals are linked.

If all thumbnails are larger than NBYTES, fewer steps are shown: evenly spaced ones, with the first
and the last.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from xlsd_cache.pages.thumbnails import data_uri, thumbnail
from xlsd_train.runs.downsample import evenly
from xlsd_train.runs.history import History
from xlsd_train.runs.layout import SAMPLES, step_name

NBYTES = 32 << 20  # of all thumbnails of a page
PROMPTS = 8  # shown of each run
STEPS = 400  # that a server's page shows


@dataclass(frozen=True)
class Sheet:
    """The samples of one run at one step."""

    run: int
    step: int
    pictures: list[str | None]  # URIs by prompt


@dataclass(frozen=True)
class Timeline:
    """What the page shows of the samples."""

    sheets: list[Sheet]
    prompts: list[list[str]]  # [run][prompt]
    folders: list[str]  # of each run's samples, as a URL relative to the page
    note: str

    @property
    def steps(self) -> list[int]:
        """The steps that any run has."""
        return sorted({sheet.step for sheet in self.sheets})

    @property
    def data(self) -> dict[str, Any]:
        """For the page's script, which reads the pictures sheet by sheet."""
        return {"prompts": self.prompts, "folders": self.folders, "steps": self.steps}

    def first_and_newest(self, run: int) -> list[tuple[str, list[tuple[int, str]]]]:
        """Prompt -> (step, picture) of the first and the newest step that show it."""
        sheets = [sheet for sheet in self.sheets if sheet.run == run]
        found = []
        for i, prompt in enumerate(self.prompts[run]):
            shown = [(it.step, uri) for it in sheets if (uri := it.pictures[i])]
            if shown:
                found.append((prompt, [shown[0], *shown[1:][-1:]]))
        return found


def timeline(runs: Sequence[History], page: Path) -> Timeline:
    """The samples of the first PROMPTS prompts, for a page at this path."""
    steps = sorted({step for run in runs for step in run.samples})
    prompts = [_prompts(run) for run in runs]
    read = {
        (i, step): [_thumbnail(run, step, prompt) for prompt in range(len(prompts[i]))]
        for step in steps
        for i, run in enumerate(runs)
        if step in run.samples
    }
    size = sum(len(content) for contents in read.values() for content in contents if content)
    most = max(2, len(steps) if size <= NBYTES else NBYTES * len(steps) // size)
    chosen = [steps[i] for i in evenly(len(steps), most)]
    sheets = [
        Sheet(i, step, [data_uri(content) if content else None for content in contents])
        for (i, step), contents in read.items()
        if step in set(chosen) and any(contents)
    ]
    damaged = sum(content == b"" for contents in read.values() for content in contents)
    note = _note(runs, steps, chosen, damaged)
    return Timeline(sheets, prompts, [_url(run, page) for run in runs], note)


def served(runs: Sequence[History]) -> Timeline:
    """The same with URLs of thumbnails, which `xlsd-train live` serves."""
    steps = sorted({step for run in runs for step in run.samples})
    chosen = [steps[i] for i in evenly(len(steps), STEPS)]
    prompts = [_prompts(run) for run in runs]
    folders = [f"{SAMPLES}/{i}" for i in range(len(runs))]
    sheets = []
    for i, run in enumerate(runs):
        for step in chosen:
            drawn = {path.stem for path in run.samples.get(step, ())}
            names = [f"{prompt:02d}" for prompt in range(len(prompts[i]))]
            place = f"{folders[i]}/{step_name(step)}"
            if drawn:
                pictures = [f"{place}/{name}.webp" if name in drawn else None for name in names]
                sheets.append(Sheet(i, step, pictures))
    return Timeline(sheets, prompts, folders, _note(runs, steps, chosen))


def _note(
    runs: Sequence[History], steps: Sequence[int], chosen: Sequence[int], damaged: int = 0
) -> str:
    """What is left out."""
    most = max((len(paths) for run in runs for paths in run.samples.values()), default=0)
    notes = [
        f"{len(chosen)} of {len(steps)} steps, evenly spaced." * (len(chosen) < len(steps)),
        f"The first {PROMPTS} of {most} prompts." * (most > PROMPTS),
        f"Left out: damaged pictures, {damaged}." * (damaged > 0),
    ]
    return " ".join(filter(None, notes))


def _prompts(run: History) -> list[str]:
    """The prompts that have samples; empty ones where the record has fewer."""
    count = min(PROMPTS, max((len(paths) for paths in run.samples.values()), default=0))
    named = [str(prompt) for prompt in run.record.prompts[:count]]
    return named + [""] * (count - len(named))


def _thumbnail(run: History, step: int, prompt: int) -> bytes | None:
    """Empty for a damaged picture, None for one that was not drawn."""
    named = {path.stem: path for path in run.samples[step]}
    path = named.get(f"{prompt:02d}")
    return (thumbnail(path) or b"") if path else None


def _url(run: History, page: Path) -> str:
    folder = (run.folder / SAMPLES).absolute()
    try:
        return quote(Path(os.path.relpath(folder, page.absolute().parent)).as_posix())
    except ValueError:  # on another drive of Windows
        return folder.as_uri()
