"""Charts of paired changes, for the page's templates: bands of noise, and learning rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from xlsd_train.report.ranking import Standing
from xlsd_train.report.trend import Trend


@dataclass(frozen=True)
class Bands:
    """The change in each band of timesteps since the first validation, on one scale."""

    titles: list[str]
    trends: list[tuple[int, Trend]]  # run
    low: float
    high: float

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last."""
        steps = [step for _, trend in self.trends for step in trend.banded]
        return min(steps), max(steps)


def bands(trends: Sequence[Trend | None]) -> Bands | None:
    """The bands of all runs that were validated twice; None without any."""
    found = [(i, trend) for i, trend in enumerate(trends) if trend]
    every = [it for _, trend in found for band in trend.bands for it in band]
    low = min([0.0, *(it.low for it in every)])
    high = max([0.0, *(it.high for it in every)])
    if not every or not math.isfinite(high - low):
        return None
    count = len(found[0][1].bands)
    ends = [f"{100 * band // count}" for band in range(count + 1)]
    titles = [f"{start} to {end}%" for start, end in pairwise(ends)]
    titles[0], titles[-1] = "least noise", "most noise"
    return Bands(titles, found, low, high if high > low else 1.0)


def scale(standings: Sequence[Standing]) -> tuple[float, float] | None:
    """The least and the highest end of the intervals above the best run, and 0."""
    ends = [end for run in standings if run.excess for end in (run.excess.low, run.excess.high)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if high > low else None


def by_rate(standings: Sequence[Standing]) -> list[tuple[float, Standing]]:
    """(percent of the chart's width, run) by learning rate; empty if the rates do not differ."""
    runs = [run for run in standings if run.loss]
    rates = [run.rate for run in runs if isinstance(run.rate, int | float) and run.rate > 0]
    if len(rates) < len(runs) or len(set(rates)) < 2 or scale(standings) is None:
        return []
    logs = [math.log(rate) for rate in rates]
    spread = max(logs) - min(logs)
    at = [round(20 + 66 * (log - min(logs)) / spread, 2) for log in logs]
    return sorted(zip(at, runs, strict=True), key=lambda it: it[0])
