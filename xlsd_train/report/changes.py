"""Charts of paired changes, for the page's templates: bands of noise, and learning rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xlsd_train.report.ranking import Standing
from xlsd_train.report.trend import Trend
from xlsd_train.runs.bootstrap import Interval

Points = list[tuple[int, Interval]]  # step, change


@dataclass(frozen=True)
class Newest:
    """A run's newest change in a band."""

    run: int
    mean: float
    state: str  # in a word: whether the interval leaves no change out


@dataclass(frozen=True)
class Band:
    """One small chart."""

    title: str
    newest: list[Newest]  # of each run
    lines: list[tuple[int, Points]]  # colour


@dataclass(frozen=True)
class Bands:
    """The small charts, on one scale."""

    charts: list[Band]
    first: int  # step
    last: int
    low: float
    high: float
    rows: list[list[str]]  # the newest changes in words


@dataclass(frozen=True)
class RatePoint:
    """A run in the chart of learning rates."""

    x: float  # percent of the width
    y: float  # loss above the best run's
    label: str
    kind: str
    verdict: str
    excess: Interval | None


def bands(trends: Sequence[Trend | None]) -> Bands | None:
    """The change in each band since the first validation; None if nothing was compared."""
    found = [(i, trend) for i, trend in enumerate(trends) if trend]
    every = [it for _, trend in found for band in trend.bands for it in band]
    low = min((it.low for it in every), default=math.nan)
    high = max((it.high for it in every), default=math.nan)
    if not math.isfinite(high - low):
        return None
    count = len(found[0][1].bands)
    made = [
        Band(
            _title(band, count),
            [_newest(i, trend.bands[band][-1]) for i, trend in found],
            [
                (i % 8, list(zip(trend.banded, trend.bands[band], strict=True)))
                for i, trend in found
            ],
        )
        for band in range(count)
    ]
    rows = [
        [
            _title(band, count),
            *(_percent(trend.bands[band][-1]) if trend else "" for trend in trends),
        ]
        for band in range(count)
    ]
    steps = [step for _, trend in found for step in trend.banded]
    low, high = min(low, 0), max(high, 0)
    return Bands(made, min(steps), max(steps), low, high if high > low else low + 1, rows)


def scale(standings: Sequence[Standing]) -> tuple[float, float] | None:
    """The least and the highest end of the intervals above the best run, and 0."""
    ends = [end for run in standings if run.excess for end in (run.excess.low, run.excess.high)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if high > low else None


def rate_points(standings: Sequence[Standing]) -> list[RatePoint]:
    """The compared runs by learning rate; empty if they do not differ in it."""
    runs = [run for run in standings if run.loss and isinstance(run.rate, int | float)]
    logs = [math.log(run.rate) for run in runs if run.rate and run.rate > 0]
    if len(logs) < len(runs) or len(set(logs)) < 2 or scale(standings) is None:
        return []
    spread = max(logs) - min(logs)
    return [
        RatePoint(
            round(12 + 76 * (log - min(logs)) / spread, 2),
            run.excess.mean if run.excess else 0.0,
            f"{run.rate:g}",
            run.kind,
            run.verdict,
            run.excess,
        )
        for run, log in sorted(zip(runs, logs, strict=True), key=lambda it: it[1])
    ]


def _title(band: int, count: int) -> str:
    if band in {0, count - 1}:
        return "most noise" if band else "least noise"
    return f"{100 * band // count} to {100 * (band + 1) // count}%"


def _newest(run: int, change: Interval) -> Newest:
    clear = "better" if change.high < 0 else "worse" if change.low > 0 else "unclear"
    return Newest(run, change.mean, clear)


def _percent(change: Interval) -> str:
    mean, low, high = (f"{100 * x:+.1f}%" for x in change)
    return f"{mean} ({low} to {high})"
