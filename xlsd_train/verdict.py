"""What validation's losses say, with how sure they are. Pure, and repeatable to the bit.

Intervals are percentile bootstraps over samples (Efron, Tibshirani: An introduction to the
bootstrap, 1993, chapter 13): how much a mean would move, had other images been held out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from xlsd_train import draw

RESAMPLES, ENDS = 2000, (0.025, 0.975)  # 95%
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
class Verdict(Generic[Name]):
    """The best of the candidates, and those that it cannot be told apart from."""

    best: Name
    loss: Interval
    alike: list[Name]


def intervals(losses: Losses) -> list[Interval]:
    """Of the mean over all bands, and then of each band."""
    values = np.column_stack([losses.mean(axis=1, dtype=np.float64), losses.astype(np.float64)])
    return _intervals(values.mean(axis=0), _weights(len(values), "bootstrap") @ values)


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
    ours, theirs = (x.mean(axis=1, dtype=np.float64) for x in (held_out, training))
    resampled = _weights(len(ours), "bootstrap") @ ours
    resampled = resampled - _weights(len(theirs), "bootstrap training") @ theirs
    return _intervals((ours.mean() - theirs.mean())[None], resampled[:, None])[0]


def verdict(candidates: Mapping[Name, Losses]) -> Verdict[Name]:
    """The lowest held-out loss; of equal ones the first. Others are compared image by image.

    A candidate whose losses exceed the best's by an amount whose interval holds 0 is not told
    apart from it: with other held-out images it might have won.
    """
    means = {name: float(x.mean(dtype=np.float64)) for name, x in candidates.items()}
    best = min(means, key=means.__getitem__)
    alike = [
        name
        for name, losses in candidates.items()
        if name != best and excess(losses, candidates[best]).low <= 0
    ]
    return Verdict(best, intervals(candidates[best])[0], alike)


def excess(losses: Losses, other: Losses) -> Interval:
    """How much more the first loses, by a paired bootstrap over their common images."""
    each = (losses.astype(np.float64) - other.astype(np.float64)).mean(axis=1)
    resampled = _weights(len(each), "bootstrap") @ each
    return _intervals(each.mean()[None], resampled[:, None])[0]


def _weights(count: int, purpose: str) -> NDArray[np.float64]:
    """What each of `count` samples weighs in each resample, f64 [RESAMPLES, count]."""
    drawn = draw.words(0, purpose, np.arange(RESAMPLES * count)) % np.uint64(count)
    at = drawn.astype(np.int64).reshape(RESAMPLES, count) + count * np.arange(RESAMPLES)[:, None]
    times = np.bincount(at.ravel(), minlength=RESAMPLES * count)
    return times.reshape(RESAMPLES, count) / count


def _intervals(means: NDArray[np.float64], resampled: NDArray[np.float64]) -> list[Interval]:
    low, high = np.quantile(resampled, ENDS, axis=0)
    return [
        Interval(*each) for each in zip(means.tolist(), low.tolist(), high.tolist(), strict=True)
    ]
