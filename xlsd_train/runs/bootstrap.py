"""What losses and scores say, with how sure they are. Pure, and repeatable to the bit.

Intervals are percentile bootstraps over samples (Efron, Tibshirani: An introduction to the
bootstrap, 1993, chapter 13): how much a mean would move, had other images been held out or drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.dataset import rng as draw

RESAMPLES, ENDS = 2000, (0.025, 0.975)  # 95%
AT_ONCE = 2**24  # weights, 128 MiB; of up to 8388 images all resamples are summed at once
NARROW = 30  # images; of normal figures a 95% interval of 4 holds 81%, of 12 91%, of 30 94%
Name = TypeVar("Name")
Losses = NDArray[np.float32]  # [samples, bands], unweighted; rows of two of them are the same image


class Interval(NamedTuple):
    """A mean and the 95% interval around it."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.5f} ({self.low:.5f} to {self.high:.5f})"


@dataclass(frozen=True)
class Estimate:
    """A figure, and what it would be for each resample of its images.

    Estimates of as many images share their resamples: where image i of both is the same, their
    difference is a paired bootstrap's.
    """

    value: float
    resampled: NDArray[np.float64]  # [RESAMPLES]

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def __neg__(self) -> "Estimate":
        return Estimate(-self.value, -self.resampled)

    @property
    def interval(self) -> Interval:
        """The figure with its 95% interval."""
        return _intervals(np.array([self.value]), self.resampled[:, None])[0]


@dataclass(frozen=True)
class Verdict(Generic[Name]):
    """The best of the candidates, and those statistically tied with it."""

    best: Name
    loss: Interval
    alike: list[Name]


def intervals(losses: Losses) -> list[Interval]:
    """Of the mean over all bands, and then of each band."""
    values = np.column_stack([losses.mean(axis=1, dtype=np.float64), losses.astype(np.float64)])
    return _intervals(values.mean(axis=0), _resampled(values, "bootstrap"))


def summary(held_out: Losses, training: Losses) -> dict[str, Any]:
    """For validation.jsonl: both sets, and the gap between them, which is what was memorised."""
    sets = {"held_out": intervals(held_out), "training": intervals(training)}
    told = {
        name: {**found[0]._asdict(), "bands": [band._asdict() for band in found[1:]]}
        for name, found in sets.items()
    }
    return {**told, "gap": gap(held_out, training)._asdict()}


def gap(held_out: Losses, training: Losses) -> Interval:
    """Held-out loss minus training loss, the two sets' images resampled apart."""
    return (overall(held_out) - overall(training, "bootstrap training")).interval


def verdict(candidates: Mapping[Name, Losses]) -> Verdict[Name]:
    """The lowest held-out loss; of equal ones the first. Others are compared image by image."""
    return lowest({name: overall(losses) for name, losses in candidates.items()})


def lowest(candidates: Mapping[Name, Estimate]) -> Verdict[Name]:
    """The lowest of figures that share their resamples; of equal ones the first.

    A candidate is statistically tied if the interval of its excess over the best holds 0: with
    other images it might have won.
    """
    best = min(candidates, key=lambda name: candidates[name].value)
    alike = [
        name
        for name, found in candidates.items()
        if name != best and (found - candidates[best]).interval.low <= 0
    ]
    return Verdict(best, candidates[best].interval, alike)


def overall(losses: Losses, purpose: str = "bootstrap") -> Estimate:
    """The mean over all bands and images."""
    return mean(losses.mean(axis=1, dtype=np.float64), purpose)


def mean(values: NDArray[np.float64], purpose: str = "bootstrap") -> Estimate:
    """Of one value an image."""
    return Estimate(float(values.mean()), _resampled(values, purpose))


def _resampled(values: NDArray[np.float64], purpose: str) -> NDArray[np.float64]:
    """The mean of each resample of the rows, as many resamples at once as memory is to hold."""
    count = len(values)
    some = max(1, min(RESAMPLES, AT_ONCE // count))
    starts = range(0, RESAMPLES, some)
    parts = (weights(count, purpose, range(i, min(i + some, RESAMPLES))) for i in starts)
    return np.concatenate([part @ values for part in parts])


def weights(
    count: int, purpose: str = "bootstrap", which: range = range(RESAMPLES)
) -> NDArray[np.float64]:
    """What each of `count` images weighs in these resamples, f64 [resamples, count]."""
    n = len(which)
    drawn = draw.words(0, purpose, np.arange(which.start * count, which.stop * count))
    at = (drawn % np.uint64(count)).astype(np.int64).reshape(n, count)
    times = np.bincount((at + count * np.arange(n)[:, None]).ravel(), minlength=n * count)
    return times.reshape(n, count) / count


def _intervals(means: NDArray[np.float64], resampled: NDArray[np.float64]) -> list[Interval]:
    low, high = np.quantile(resampled, ENDS, axis=0)
    return [
        Interval(*each) for each in zip(means.tolist(), low.tolist(), high.tolist(), strict=True)
    ]
