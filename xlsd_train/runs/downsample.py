"""Downsamples a log to a bounded number of points: mean, minimum and maximum of each stretch.

A stretch is one step while the points suffice; then neighbouring stretches are merged. So a log is
read once, in order, and no minimum or maximum is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 2000  # more than a chart is wide in pixels


@dataclass(frozen=True)
class Series:
    """One metric over the steps; if `every` is 1, all four lists are the log's own values."""

    every: int  # steps per point
    steps: list[float]  # the mean step of each point
    mean: list[float]
    low: list[float]
    high: list[float]


class Downsampler:
    """Takes lines in any amounts; `series` is the result so far."""

    def __init__(self, names: Sequence[str], points: int = POINTS) -> None:
        self.names = list(names)
        self.every = 1
        self.points = points + points % 2  # pairs are merged
        shape = (len(self.names), self.points)
        self._count, self._sum, self._step = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._low, self._high = np.full(shape, np.inf), np.full(shape, -np.inf)

    def add(self, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Add steps [n], not negative, and values [names, n]; nan and infinite ones are skipped."""
        while len(steps) and steps.max() // self.every >= self.points:
            self._merge()
        points = steps // self.every
        for row, numbers in enumerate(values):
            finite = np.isfinite(numbers)
            ids, kept = points[finite], numbers[finite]
            self._count[row] += np.bincount(ids, minlength=self.points)
            self._sum[row] += np.bincount(ids, kept, self.points)
            self._step[row] += np.bincount(ids, steps[finite], self.points)
            np.minimum.at(self._low[row], ids, kept)
            np.maximum.at(self._high[row], ids, kept)

    def series(self, name: str) -> Series:
        """One metric; a stretch without a value has no point."""
        row = self.names.index(name)
        logged = self._count[row] > 0
        count = self._count[row][logged]
        mean, steps = (x[row][logged] / count for x in (self._sum, self._step))
        low, high = (x[row][logged].tolist() for x in (self._low, self._high))
        return Series(self.every, steps.tolist(), mean.tolist(), low, high)

    def _merge(self) -> None:
        """Double the stretches, which then take the first half of the points."""
        self.every *= 2
        half, empty = self.points // 2, np.zeros((len(self.names), self.points // 2))
        for sums in (self._count, self._sum, self._step):
            sums[:] = np.hstack([sums[:, ::2] + sums[:, 1::2], empty])
        self._low[:, :half] = np.minimum(self._low[:, ::2], self._low[:, 1::2])
        self._high[:, :half] = np.maximum(self._high[:, ::2], self._high[:, 1::2])
        self._low[:, half:], self._high[:, half:] = np.inf, -np.inf


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spaced, with the first and the last."""
    chosen = min(count, most)
    return [round(i * (count - 1) / max(1, chosen - 1)) for i in range(chosen)]
