"""Per-channel mean and standard deviation of a store's raw latents."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.store import LatentStore

MEASURED = 2048  # samples whose latents are read: the mean to 0.1% of the spread


class Moments(NamedTuple):
    """What `moments` finds; both lists are empty for a store without samples."""

    mean: list[float]  # by channel, of raw latents
    std: list[float]
    samples: int  # that were read


def moments(store: LatentStore) -> Moments:
    """Mean and standard deviation by channel over up to 2 * MEASURED samples, evenly spread.

    The same generation of a store gives the same numbers, to the bit.
    """
    stride = max(1, len(store) // MEASURED)
    sums: Counter[str] = Counter()
    total = np.zeros(store.identity.channels)
    squares = np.zeros(store.identity.channels)
    for bucket, rows in store.buckets.items():
        for row in rows[::stride]:
            latent: NDArray[np.float64] = store.read(bucket, [row])[0].astype(np.float64)
            total += latent.sum(axis=(1, 2))
            squares += np.square(latent).sum(axis=(1, 2))
            sums.update(samples=1, values=latent[0].size)
    if not sums["samples"]:
        return Moments([], [], 0)
    mean = total / sums["values"]
    std = np.sqrt(np.maximum(0, squares / sums["values"] - mean**2))
    return Moments(mean.tolist(), std.tolist(), sums["samples"])
