"""Bootstrap confidence intervals of losses and scores, and paired comparisons. Deterministic.

Percentile bootstraps over images (Efron, Tibshirani: An introduction to the bootstrap, 1993,
chapter 13): how much a mean would vary with other images.
"""

from collections.abc import Mapping, Sequence
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
    """A figure, and its value for each resample of the images.

    Estimates of equally many images share their resamples: if image i of both is the same, their
    difference is a paired bootstrap.
    """

    value: float
    resampled: NDArray[np.float64]  # [RESAMPLES]

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def relative_to(self, other: "Estimate") -> "Estimate":
        """The change since another estimate of the same images, as a share of it."""
        with np.errstate(all="ignore"):  # 0 / 0 of a model without loss
            ratios = self.resampled / other.resampled - 1
        value = self.value / other.value - 1 if other.value else float("nan")
        return Estimate(value, ratios)

    def __neg__(self) -> "Estimate":
        return Estimate(-self.value, -self.resampled)

    @property
    def interval(self) -> Interval:
        """The figure with its 95% interval."""
        return _intervals(np.array([self.value]), self.resampled[:, None])[0]


@dataclass(frozen=True)
class Comparison(Generic[Name]):
    """The best of the candidates, and those statistically tied with it."""

    best: Name
    loss: Interval
    tied: list[Name]


def intervals(losses: Losses) -> list[Interval]:
    """The mean over all bands, then each band."""
    values = np.column_stack([losses.mean(axis=1, dtype=np.float64), losses.astype(np.float64)])
    return _intervals(values.mean(axis=0), _resampled(values, "bootstrap"))


def summary(held_out: Losses, training: Losses) -> dict[str, Any]:
    """For validation.jsonl: both sets, and the generalisation gap between them."""
    sets = {"held_out": intervals(held_out), "training": intervals(training)}
    figures = {
        name: {**overall._asdict(), "bands": [band._asdict() for band in bands]}
        for name, (overall, *bands) in sets.items()
    }
    return {**figures, "gap": gap(held_out, training)._asdict()}


def gap(held_out: Losses, training: Losses) -> Interval:
    """Held-out loss minus training loss; the two sets are resampled independently."""
    return (overall(held_out) - overall(training, "bootstrap training")).interval


def compare(candidates: Mapping[Name, Losses]) -> Comparison[Name]:
    """The lowest held-out loss, the first of equal ones, compared image by image."""
    return lowest(dict(zip(candidates, overalls(list(candidates.values())), strict=True)))


def lowest(candidates: Mapping[Name, Estimate]) -> Comparison[Name]:
    """The lowest of figures that share their resamples; of equal ones the first.

    A candidate is statistically tied if the interval of its excess over the best holds 0: with
    other images it might have won.
    """
    best = min(candidates, key=lambda name: candidates[name].value)
    tied = [
        name
        for name, estimate in candidates.items()
        if name != best and (estimate - candidates[best]).interval.low <= 0
    ]
    return Comparison(best, candidates[best].interval, tied)


def overall(losses: Losses, purpose: str = "bootstrap") -> Estimate:
    """The mean over all bands and images."""
    return mean(losses.mean(axis=1, dtype=np.float64), purpose)


def overalls(losses: Sequence[Losses]) -> list[Estimate]:
    """`overall` of each of several losses, of equally many images from one set of resamples."""
    if len({len(each) for each in losses}) > 1:
        return [overall(each) for each in losses]
    return means(np.column_stack([each.mean(axis=1, dtype=np.float64) for each in losses]))


def means(values: NDArray[np.float64]) -> list[Estimate]:
    """`mean` of each column of values [images, columns], from one set of resamples."""
    resampled = _resampled(values, "bootstrap")
    return [
        Estimate(float(column.mean()), each)
        for column, each in zip(values.T, resampled.T, strict=True)
    ]


def mean(values: NDArray[np.float64], purpose: str = "bootstrap") -> Estimate:
    """The mean of one value per image."""
    return Estimate(float(values.mean()), _resampled(values, purpose))


def _resampled(values: NDArray[np.float64], purpose: str) -> NDArray[np.float64]:
    """The mean of each resample of the rows, some resamples at a time to bound memory."""
    count = len(values)
    some = max(1, min(RESAMPLES, AT_ONCE // count))
    starts = range(0, RESAMPLES, some)
    parts = (weights(count, purpose, range(i, min(i + some, RESAMPLES))) for i in starts)
    return np.concatenate([part @ values for part in parts])


def weights(
    count: int, purpose: str = "bootstrap", which: range = range(RESAMPLES)
) -> NDArray[np.float64]:
    """The weight of each of `count` images in these resamples, f64 [resamples, count]."""
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
