"""The data of the page's charts: what was logged, in short numbers, for the page's script to draw.

Secondary charts have fewer points. The script smooths, zooms and converts steps to other units.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from xlsd_cache.pages.render import short
from xlsd_train.report.trend import MEASURED, shown_validations
from xlsd_train.runs.downsample import Series, evenly
from xlsd_train.runs.history import AXES, History
from xlsd_train.runs.metrics import METRICS
from xlsd_train.runs.validation_log import HELD_OUT, LIVE, TRAINING

POINTS, KNOTS = 500, 200  # of a line in a secondary chart; of a conversion of units
Numbers = list[float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    run: int
    label: str
    kind: str  # raw: to be smoothed; line; dashed; interval: with its ends at each point
    x: Numbers  # steps
    y: Numbers
    low: Numbers = field(default_factory=list)  # of an interval, or the least value near a point
    high: Numbers = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """One chart; `id` is its metric."""

    id: str
    title: str
    unit: str
    sentence: str  # what it shows, for readers who do not see it
    note: str
    lines: list[Line]

    @property
    def data(self) -> dict[str, Any]:
        """For the page's script."""
        return asdict(self)


def charts(runs: Sequence[History]) -> list[Chart]:
    """The charts that have data: the loss, then the secondary ones."""
    of: dict[str, tuple[str, str, Callable[[int, History], list[Line]]]] = {
        "loss": ("Loss", "", partial(_loss, alone=len(runs) == 1)),
        "lr": ("Learning rate", "", _rates),
        "gap": (
            "Generalisation gap",
            "held-out minus training loss",
            partial(_intervals, part="gap"),
        ),
    }
    for name in ("d", "grad_norm", "images_per_s", "peak_gib", "wait_s"):
        title = METRICS[name].chart
        of[name] = title, _unit(name), partial(_metric, name=name, label=title)
    found = []
    for name, (title, unit, lines_of) in of.items():
        lines = [line for i, run in enumerate(runs) for line in lines_of(i, run) if line.x]
        if lines:
            sentence = _sentence(title, lines, [run.name for run in runs])
            found.append(Chart(name, title, unit, sentence, _note(name, runs), lines))
    return found


def axes(run: History) -> dict[str, Numbers]:
    """Steps, and at each the images, epochs and hours so far, to convert between them."""
    if any(name not in run.series for name in AXES):
        return {}
    # Each stretch has all three, unless a stranger wrote the log.
    if len({tuple(run.series[name].steps) for name in AXES}) > 1:
        return {}
    chosen = evenly(len(run.series[AXES[0]].steps), KNOTS)
    columns = {"step": run.series[AXES[0]].steps, **{x: run.series[x].mean for x in AXES}}
    return {
        name: [0, *(short(values[i], 8) for i in chosen)]
        for name, values in columns.items()
        if np.all(np.diff(values) >= 0)
    }


def _loss(i: int, run: History, alone: bool) -> list[Line]:
    lines = _metric(i, run, "loss", "each step", "raw", most=None)
    for weights in dict.fromkeys(line["weights"] for line in run.validation):
        suffix = "" if weights == LIVE else f", {weights}"
        found = _intervals(i, run, HELD_OUT, f"held-out{suffix}", weights)
        lines += found if weights == LIVE else [_without_ends(line) for line in found]
        if alone and weights == LIVE:
            name = "training images, measured the same way"
            lines += map(_without_ends, _intervals(i, run, TRAINING, name))
    return lines


def _rates(i: int, run: History) -> list[Line]:
    """The effective rate; also --lr where the two differ."""
    effective, rate = (_metric(i, run, x, x) for x in ("lr_effective", "lr"))
    if run.series.get("lr") == run.series.get("lr_effective"):
        return [replace(line, label="learning rate") for line in rate]
    return [replace(line, label="effective") for line in effective] + list(map(_without_ends, rate))


def _metric(
    i: int, run: History, name: str, label: str, kind: str = "line", most: int | None = POINTS
) -> list[Line]:
    series = run.series.get(name)
    if series is None:
        return []
    x, y, low, high = _thinned(series, most or len(series.steps))
    return [Line(i, label, kind, x, y, low, high)]


def _thinned(series: Series, most: int) -> list[Numbers]:
    """Steps, means, minima, maxima of at most `most` points; no minima if a point is one step."""
    each = -(-len(series.steps) // most)
    starts = np.arange(0, len(series.steps), each)
    counts = np.diff(starts, append=len(series.steps))
    with np.errstate(over="ignore"):
        means = [np.add.reduceat(x, starts) / counts for x in (series.steps, series.mean)]
    ends = [np.minimum.reduceat(series.low, starts), np.maximum.reduceat(series.high, starts)]
    columns = [*means, *ends] if each * series.every > 1 else means
    found = [[short(value, 8 * (i == 0) or 5) for value in x] for i, x in enumerate(columns)]
    return [*found, [], []][:4]


def _intervals(
    i: int, run: History, part: str, label: str = "gap", weights: str = LIVE
) -> list[Line]:
    lines = shown_validations(run, weights)
    columns = [[short(line[part][end]) for line in lines] for end in ("mean", "low", "high")]
    return [Line(i, label, "interval", [line["step"] for line in lines], *columns)]


def _without_ends(line: Line) -> Line:
    return Line(line.run, line.label, "dashed", line.x, line.y)


def _sentence(title: str, lines: Sequence[Line], runs: Sequence[str]) -> str:
    """The first and the last value of each line."""
    many = len({line.run for line in lines}) > 1
    parts = [
        f"{runs[line.run] + ' ' if many else ''}{line.label} {line.y[0]:.4g} at step "
        f"{line.x[0]:.0f}" + (f", {line.y[-1]:.4g} at step {line.x[-1]:.0f}" if line.x[1:] else "")
        for line in lines
        if None not in {line.y[0], line.y[-1]}
    ]
    return f"Chart: {title}. " + "; ".join(parts)


def _unit(name: str) -> str:
    """Empty if the chart's title says it."""
    unit = METRICS[name].unit
    return "" if unit.lower() in METRICS[name].chart.lower() else unit


def _note(name: str, runs: Sequence[History]) -> str:
    """What the points are, and what is left out."""
    every = max((run.series[name].every for run in runs if name in run.series), default=1)
    validations = max(len({line["step"] for line in run.validation}) for run in runs)
    parts = []
    if name == "loss" and every > 1:
        parts.append(
            f"Each point is the mean of up to {every} steps. All values: shaded from their minimum "
            f"to their maximum."
        )
    if name == "loss" and validations > MEASURED:
        parts.append(f"{MEASURED} of {validations} validations, evenly spaced, and the best.")
    return " ".join(parts)
