"""Which samples of a store a run uses: all, or those that a mask leaves.

A mask is a boolean for each row of `store.samples`; masks are combined with & | ~.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.store import LatentStore

Ordinals = NDArray[np.int64]  # of a bucket's live samples
Mask = NDArray[np.bool_]  # of the rows of store.samples


@dataclass(frozen=True)
class Selection:
    """The samples of a store that are used, numbered 0, 1, ... within each bucket."""

    sizes: dict[str, int]  # bucket -> how many of it; none is 0
    of: int  # samples of the store
    chosen: dict[str, Ordinals] | None = None  # ascending; None: all samples of every bucket

    def __len__(self) -> int:
        """Selected samples of all buckets."""
        return sum(self.sizes.values())

    def ordinals(self, bucket: str, numbers: Ordinals) -> Ordinals:
        """The ordinals among the bucket's live samples of these selected ones."""
        return numbers if self.chosen is None else self.chosen[bucket][numbers]


def selected(store: LatentStore, mask: Mask) -> Selection:
    """The samples that a mask leaves."""
    if mask.all():
        return Selection({name: len(rows) for name, rows in store.buckets.items()}, len(store))
    chosen = {name: _of_bucket(store, name, mask) for name in store.buckets}
    chosen = {name: ordinals for name, ordinals in chosen.items() if len(ordinals)}
    sizes = {name: len(ordinals) for name, ordinals in chosen.items()}
    return Selection(sizes, len(store), chosen)


def held_out(store: LatentStore, fraction: float) -> Mask:
    """Which samples validation alone may use: those whose content's hash is below the fraction.

    sha256 is as good as uniform, so its first 64 bits decide: the same image is always on the same
    side, in whatever store and however that grows, and duplicates are together. Samples that were
    imported without their images go by their latent's crc32c.
    """
    if fraction <= 0:
        return np.zeros(len(store), np.bool_)
    hashes = store.samples["content_hash"]
    below = pc.less(pc.utf8_slice_codeunits(hashes, 0, 16), f"{int(fraction * 2**64):016x}")
    crc = store.samples["crc32c"].to_numpy().astype(np.float64) < fraction * 2**32
    mask: Mask = np.where(pc.equal(hashes, "").to_numpy(), crc, below.to_numpy())
    return mask


def evenly(mask: Mask, count: int) -> Mask:
    """At most `count` of the samples that a mask leaves, spread over all buckets and rows."""
    rows = np.flatnonzero(mask)
    count = min(count, len(rows))
    some = np.zeros_like(mask)
    some[rows[np.arange(count) * len(rows) // max(count, 1)]] = True
    return some


def _of_bucket(store: LatentStore, bucket: str, mask: Mask) -> Ordinals:
    ends = store.sample_index(bucket, np.array([0, len(store.buckets[bucket])]))
    return np.flatnonzero(mask[slice(*ends.tolist())])
