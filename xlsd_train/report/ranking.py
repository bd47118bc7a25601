"""Ranks runs by held-out loss, with 95% intervals of their differences.

A run's loss is the lowest of all its steps and weights. Runs are compared image by image on the
images that all of them held out (runs/bootstrap.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np

from xlsd_train.report.trend import diverged
from xlsd_train.runs.bootstrap import NARROW, Interval, Losses, overall
from xlsd_train.runs.bootstrap import lowest as lowest_of
from xlsd_train.runs.history import History
from xlsd_train.runs.layout import checkpoints, step_of
from xlsd_train.runs.validation_log import HELD_OUT, Candidate, candidate_name, read_losses


@dataclass(frozen=True)
class Standing:
    """One run's place in the comparison."""

    name: str
    rate: float | None  # its --lr
    step: int  # its last
    smoothed: float | None  # training loss at that step
    best: Candidate | None = None  # with the lowest held-out loss; None: not compared
    loss: Interval | None = None  # held-out, of `best`
    excess: Interval | None = None  # `loss` minus the best run's; None: this is the best run
    saved: bool = True  # whether a checkpoint has the weights of `best`

    @property
    def tied(self) -> bool:
        """Whether its loss exceeds the best run's by an amount whose 95% interval holds 0."""
        return self.excess is not None and self.excess.low <= 0

    @property
    def kind(self) -> str:
        """The comparison with the best run, in a word; empty if it was not compared."""
        if self.loss is None:
            return ""
        return "best" if self.excess is None else "tied" if self.tied else "worse"

    @property
    def verdict(self) -> str:
        """The comparison with the best run, in words."""
        if self.loss is None:
            return "not validated"
        if self.excess is None:
            return "best"
        if self.tied:
            return f"statistically tied: {self.excess.mean:+.5f}"
        return f"worse by {self.excess}"

    @property
    def best_at(self) -> str:
        """Step and weights of the lowest held-out loss, in words."""
        if self.best is None:
            return ""
        return candidate_name(self.best) + ("" if self.saved else " (not saved)")

    @property
    def cells(self) -> tuple[str, ...]:
        """Cells of a table's row under HEADER."""
        return (
            self.name,
            str(self.step),
            f"{self.smoothed:.5f}" if self.smoothed is not None else "",
            str(self.loss) if self.loss else "",
            self.best_at,
            self.verdict,
        )


HEADER = ("run", "steps", "smoothed loss", "best held-out loss", "at", "vs best")


def rank(runs: list[History]) -> tuple[list[Standing], str]:
    """Every run's standing, in the runs' order, and the conclusion in one sentence."""
    standings = [
        Standing(
            run.name, run.config.get("lr"), run.last.get("step", 0), run.last.get("loss_smoothed")
        )
        for run in runs
    ]
    # Losses of step 0 alone are the starting model's, not the run's.
    measured = {run.name: run for run in runs if any(line["step"] for line in run.validation)}
    lowest = {name: _lowest(run) for name, run in measured.items()}
    validated = {name: best for name, best in lowest.items() if best is not None}
    if not validated:
        return standings, _by_training(standings)
    if why := _incomparable([measured[name] for name in validated]):
        return standings, f"the runs' losses are not comparable: {why}"
    keys = {name: measured[name].record.validation[HELD_OUT] for name in validated}
    common = set.intersection(*map(set, keys.values()))
    if len(common) < 2:
        return standings, "the runs' losses are not comparable: they held out different images"
    losses = {
        name: rows[[key in common for key in keys[name]]] for name, (_, rows) in validated.items()
    }
    order = {name: np.argsort([key for key in keys[name] if key in common]) for name in keys}
    losses = {name: rows[order[name]] for name, rows in losses.items()}  # rows: the same images
    estimates = {name: overall(rows) for name, rows in losses.items()}
    best = lowest_of(estimates).best
    standings = [
        replace(
            run,
            best=validated[run.name][0],
            loss=estimates[run.name].interval,
            excess=(estimates[run.name] - estimates[best]).interval if run.name != best else None,
            saved=_is_saved(measured[run.name], validated[run.name][0]),
        )
        if run.name in validated
        else run
        for run in standings
    ]
    # A run that diverged has ended: no further step would help it.
    steps = {run.last.get("step") for run in measured.values() if not diverged(run)}
    answer = _answer(standings, len(common))
    if len(steps) > 1:
        answer += " (the runs are at different steps)"
    if len(common) < NARROW:
        few = f"{len(common)} images are few: 95% intervals of fewer than {NARROW} are too narrow"
        answer += f" ({few})"
    return standings, answer


def table(standings: list[Standing]) -> str:
    """The standings as lines of text."""
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
    """The candidate with the lowest held-out loss, the first of equal ones; None without any."""
    lowest = min(_means(run), key=itemgetter(0), default=None)
    return lowest[1:] if lowest else None


def _means(run: History) -> Iterator[tuple[float, Candidate, Losses]]:
    """Each candidate's held-out losses and their mean, if all are known and finite."""
    images = len(run.record.validation.get(HELD_OUT, ()))
    for step in dict.fromkeys(line["step"] for line in run.validation):
        for name, losses in read_losses(run.folder, step).items():
            weights, _, which = name.rpartition("/")
            mean = float(losses.mean(dtype=np.float64))
            if which == HELD_OUT and len(losses) == images and np.isfinite(mean):
                yield mean, (step, weights), losses


def _is_saved(run: History, candidate: Candidate) -> bool:
    return candidate[0] in {0, *map(step_of, checkpoints(run.folder))}


def _incomparable(runs: list[History]) -> str | None:
    """Why these runs' losses measure different things; None if they measure the same."""
    kinds = {run.record.objective["kind"]: run.name for run in runs}
    scalings = {str(run.record.latents): run.name for run in runs}
    for name, values in (("objective", kinds), ("latent scaling", scalings)):
        if len(values) > 1:
            two = " and ".join(f"{value} ({run})" for value, run in list(values.items())[:2])
            return f"their {name} differs, {two}"
    return None


def _answer(standings: list[Standing], images: int) -> str:
    compared = [run for run in standings if run.loss]
    (best,) = (run for run in compared if run.excess is None)
    assert best.best is not None
    tied = [run.name for run in compared if run.tied]
    loss = f"{best.loss} at {best.best_at}"
    if best.best[0] == 0:
        return f"use none: on {images} held-out images no run improved on the model it started from"
    if len(compared) == 1:
        return f"only {best.name} was validated: {loss}"
    if len(tied) == len(compared) - 1:
        return (
            f"all are statistically tied on {images} held-out images; {best.name} has the lowest "
            f"loss, {loss}, but other images might rank the runs differently"
        )
    others = f"statistically tied: {', '.join(tied)}" if tied else "all others are worse"
    return f"use {best.name}: lowest loss on {images} held-out images, {loss}; {others}"


def _by_training(standings: list[Standing]) -> str:
    trained = [run for run in standings if run.smoothed is not None]
    if not trained:
        return "nothing to compare yet: no run has taken a step"
    best = min(trained, key=lambda run: run.smoothed or 0.0)
    return (
        f"no run was validated after its first step (--validate-every); training loss, which says "
        f"little about other images, is lowest for {best.name}: {best.smoothed:.5f}"
    )
