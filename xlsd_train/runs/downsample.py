"""A log of any length as a bounded number of points: of each stretch of steps mean, least and most.

A stretch is one step as long as the points suffice; whenever they do not, neighbours are joined. So
a log is read once, in the order it was written, and no least or most of it is ever lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 2000  # more than a chart is wide in pixels


@dataclass(frozen=True)
class Series:
    """One number of a log over the steps; where `every` is 1, all four lists are the log's own."""

    every: int  # steps a point stands for
    steps: list[float]  # the mean step of each point
    mean: list[float]
    low: list[float]
    high: list[float]


class Thinner:
    """Takes lines in any amounts; `series` gives what they come to so far."""

    def __init__(self, names: Sequence[str], points: int = POINTS) -> None:
        self.names = list(names)
        self.every = 1
        self.points = points + points % 2  # pairs are joined
        shape = (len(self.names), self.points)
        self._count, self._sum, self._step = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._low, self._high = np.full(shape, np.inf), np.full(shape, -np.inf)

    def add(self, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Steps [n], none negative, and values [names, n]; what is not finite is left out."""
        while len(steps) and steps.max() // self.every >= self.points:
            self._join()
        at = steps // self.every
        for row, found in enumerate(values):
            finite = np.isfinite(found)
            ids, kept = at[finite], found[finite]
            self._count[row] += np.bincount(ids, minlength=self.points)
            self._sum[row] += np.bincount(ids, kept, self.points)
            self._step[row] += np.bincount(ids, steps[finite], self.points)
            np.minimum.at(self._low[row], ids, kept)
            np.maximum.at(self._high[row], ids, kept)

    def series(self, name: str) -> Series:
        """Of one number; a stretch of which no line tells it has no point."""
        row = self.names.index(name)
        there = self._count[row] > 0
        count = self._count[row][there]
        mean, steps = (x[row][there] / count for x in (self._sum, self._step))
        low, high = (x[row][there].tolist() for x in (self._low, self._high))
        return Series(self.every, steps.tolist(), mean.tolist(), low, high)

    def _join(self) -> None:
        """Stretches twice as long, in the first half of the points."""
        self.every *= 2
        half, empty = self.points // 2, np.zeros((len(self.names), self.points // 2))
        for sums in (self._count, self._sum, self._step):
            sums[:] = np.hstack([sums[:, ::2] + sums[:, 1::2], empty])
        self._low[:, :half] = np.minimum(self._low[:, ::2], self._low[:, 1::2])
        self._high[:, :half] = np.maximum(self._high[:, ::2], self._high[:, 1::2])
        self._low[:, half:], self._high[:, half:] = np.inf, -np.inf


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions at even distances, the first and the last among them."""
    chosen = min(count, most)
    return [round(i * (count - 1) / max(1, chosen - 1)) for i in range(chosen)]
