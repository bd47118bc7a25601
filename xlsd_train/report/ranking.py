"""Which of several runs did best on images that none of them trained on, and how sure that is.

Each run stands with its lowest held-out loss, whichever step and weights gave it; runs are compared
image by image on those that all of them held out (verdict.py).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from xlsd_train.runs.bootstrap import NARROW, Interval, Losses, overall
from xlsd_train.runs.bootstrap import lowest as lowest_of
from xlsd_train.runs.history import History
from xlsd_train.runs.layout import checkpoints, step_of
from xlsd_train.runs.record import RunRecord
from xlsd_train.runs.validation_log import HELD_OUT, Candidate, named, read_losses


@dataclass(frozen=True)
class Standing:
    """One run among the others."""

    name: str
    step: int  # the last it took
    smoothed: float | None  # its training loss there
    best: Candidate | None = None  # where its held-out loss was lowest; None: not compared
    loss: Interval | None = None  # there
    beyond: Interval | None = None  # of that above the best run's; None: it is the best
    saved: bool = True  # whether a checkpoint holds the weights of `best`

    @property
    def verdict(self) -> str:
        """Beside the best run."""
        if self.loss is None:
            return "not validated"
        if self.beyond is None:
            return "best"
        if self.beyond.low <= 0:
            return f"not told apart: {self.beyond.mean:+.5f}"
        return f"worse by {self.beyond}"

    @property
    def at(self) -> str:
        """Where its held-out loss was lowest, in words."""
        if self.best is None:
            return ""
        return named(self.best) + ("" if self.saved else " (no checkpoint holds it)")

    @property
    def cells(self) -> tuple[str, ...]:
        """For a table, under HEADER."""
        return (
            self.name,
            str(self.step),
            f"{self.smoothed:.5f}" if self.smoothed is not None else "",
            str(self.loss) if self.loss else "",
            self.at,
            self.verdict,
        )


HEADER = ("run", "steps", "smoothed loss", "best held-out loss", "at", "beside the best")


def rank(runs: list[History]) -> tuple[list[Standing], str]:
    """Every run's standing, in the runs' order, and what they come to in one sentence."""
    standings = [
        Standing(run.name, run.last.get("step", 0), run.last.get("loss_smoothed")) for run in runs
    ]
    # The model that a run began from says nothing of the run.
    measured = {run.name: run for run in runs if any(line["step"] for line in run.validation)}
    lowest = {name: _lowest(run) for name, run in measured.items()}
    validated = {name: found for name, found in lowest.items() if found is not None}
    if not validated:
        return standings, _by_training(standings)
    if why := _unlike([measured[name] for name in validated]):
        return standings, f"the runs' losses do not compare: {why}"
    keys = {name: measured[name].record.validation[HELD_OUT] for name in validated}
    common = set.intersection(*map(set, keys.values()))
    if len(common) < 2:
        return standings, "the runs' losses do not compare: they held out different images"
    losses = {
        name: found[1][[key in common for key in keys[name]]] for name, found in validated.items()
    }
    order = {name: np.argsort([key for key in keys[name] if key in common]) for name in keys}
    losses = {name: found[order[name]] for name, found in losses.items()}  # rows: the same images
    figures = {name: overall(found) for name, found in losses.items()}
    best = lowest_of(figures).best
    standings = [
        Standing(
            it.name,
            it.step,
            it.smoothed,
            validated[it.name][0],
            figures[it.name].interval,
            (figures[it.name] - figures[best]).interval if it.name != best else None,
            _is_saved(measured[it.name], validated[it.name][0]),
        )
        if it.name in validated
        else it
        for it in standings
    ]
    few = f" ({len(common)} are few: intervals of so few hold less often than 95%)"
    return standings, _answer(standings, len(common)) + (few if len(common) < NARROW else "")


def table(standings: list[Standing]) -> str:
    """For a terminal."""
    rows = [HEADER, *(standing.cells for standing in standings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in {1, 2} else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _lowest(run: History) -> tuple[Candidate, Losses] | None:
    """Where the held-out loss was lowest, the first of equal ones; None without any."""
    found: dict[Candidate, Losses] = {}
    for step in dict.fromkeys(line["step"] for line in run.validation):
        for name, losses in read_losses(run.folder, step).items():
            weights, _, which = name.rpartition("/")
            mean = losses.mean(dtype=np.float64)
            lower = all(mean < x.mean(dtype=np.float64) for x in found.values())
            known = len(losses) == len(run.record.validation.get(HELD_OUT, ()))
            if known and which == HELD_OUT and np.isfinite(mean) and lower:
                found = {(step, weights): losses}
    return next(iter(found.items()), None)


def _is_saved(run: History, candidate: Candidate) -> bool:
    return candidate[0] in {0, *map(step_of, checkpoints(run.folder))}


def _unlike(runs: list[History]) -> str | None:
    """Why losses of these runs are of different things; None where they are of one."""
    for name, told in (("objective", _objective), ("scaling of latents", _scaling)):
        values = {str(told(run.record)): run.name for run in runs}
        if len(values) > 1:
            each = " and ".join(f"{value} ({run})" for value, run in list(values.items())[:2])
            return f"their {name} differs, {each}"
    return None


def _objective(record: RunRecord) -> str:
    return record.objective["kind"]


def _scaling(record: RunRecord) -> dict[str, Any]:
    return record.latents


def _answer(standings: list[Standing], images: int) -> str:
    compared = [it for it in standings if it.loss]
    (best,) = (it for it in compared if it.beyond is None)
    assert best.best is not None
    alike = [it.name for it in compared if it.beyond and it.beyond.low <= 0]
    if best.best[0] == 0:
        return (
            f"none of them: on {images} held-out images no run was ever better than the model it "
            f"began from"
        )
    if len(compared) == 1:
        return f"{best.name} alone was validated: {best.loss} at {best.at}"
    lowest = f"its held-out loss is lowest, {best.loss} at {best.at}"
    if not alike:
        return f"take {best.name}: {lowest}, and {images} images tell it apart from every other"
    if len(alike) == len(compared) - 1:
        return (
            f"{images} held-out images tell none of them apart: {best.name} has the lowest loss, "
            f"{best.loss} at {best.at}, and with other images another might have"
        )
    return f"take {best.name}, or {', or '.join(alike)}, not told apart from it: {lowest}"


def _by_training(standings: list[Standing]) -> str:
    begun = [it for it in standings if it.smoothed is not None]
    if not begun:
        return "nothing compares yet: no run has taken a step"
    best = min(begun, key=lambda it: it.smoothed or 0.0)
    return (
        f"no run was validated after its first step (--validate-every), so training loss alone "
        f"compares, which says little of other images: it is lowest for {best.name}, "
        f"{best.smoothed:.5f}"
    )
