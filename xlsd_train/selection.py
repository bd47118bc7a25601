"""Which samples of a store a run uses: all, or those that have and have not certain tags.

A tag is matched whole and as it is written, by the store's index of tags.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xlsd_cache import UserError
from xlsd_cache.store import LatentStore

Ordinals = NDArray[np.int64]  # of a bucket's live samples


@dataclass(frozen=True)
class Selection:
    """The samples of a store that are used, numbered 0, 1, ... within each bucket."""

    sizes: dict[str, int]  # bucket -> how many of it; none is 0
    of: int  # samples of the store
    chosen: dict[str, Ordinals] | None = None  # ascending; None: all samples of every bucket
    unknown: tuple[str, ...] = ()  # forbidden tags that no sample has: a slip of the pen?

    def __len__(self) -> int:
        """Selected samples of all buckets."""
        return sum(self.sizes.values())

    def ordinals(self, bucket: str, numbers: Ordinals) -> Ordinals:
        """The ordinals among the bucket's live samples of these selected ones."""
        return numbers if self.chosen is None else self.chosen[bucket][numbers]

    def rows(self, store: LatentStore, numbers: Ordinals) -> Ordinals:
        """Rows of `store.samples` of selected samples, counted through all buckets."""
        names = list(self.sizes)
        starts = np.cumsum([0, *self.sizes.values()])
        bucket = np.searchsorted(starts, numbers, side="right") - 1
        rows = np.empty(len(numbers), np.int64)
        for at in np.unique(bucket).tolist():
            of_it = bucket == at
            ordinals = self.ordinals(names[at], numbers[of_it] - starts[at])
            rows[of_it] = store.sample_index(names[at], ordinals)
        return rows


def select(
    store: LatentStore, columns: Sequence[str], require: Sequence[str], forbid: Sequence[str]
) -> Selection:
    """Samples with all the required tags and none of the forbidden, in any of the columns.

    Raises UserError where no sample is left, or none has a required tag.
    """
    if not require and not forbid:
        return Selection({name: len(rows) for name, rows in store.buckets.items()}, len(store))
    mask = np.ones(len(store), np.bool_)
    for tag in require:
        having = _having(store, columns, tag)
        if not having.any():
            raise UserError(
                f"--require-tags: no sample of {store.root} has exactly the tag {tag!r} in "
                f"{' or '.join(columns)}; `xlsd-train tags {store.root}` lists those there are"
            )
        mask &= having
    unknown = []
    for tag in forbid:
        having = _having(store, columns, tag)
        mask &= ~having
        if not having.any():
            unknown.append(tag)
    chosen = {name: _of_bucket(store, name, mask) for name in store.buckets}
    chosen = {name: ordinals for name, ordinals in chosen.items() if len(ordinals)}
    if not chosen:
        raise UserError(
            f"--require-tags {','.join(require) or '(none)'} and --forbid-tags "
            f"{','.join(forbid) or '(none)'} leave none of the {len(store)} samples of "
            f"{store.root}; require or forbid fewer"
        )
    sizes = {name: len(ordinals) for name, ordinals in chosen.items()}
    return Selection(sizes, len(store), chosen, tuple(unknown))


def _having(store: LatentStore, columns: Sequence[str], tag: str) -> NDArray[np.bool_]:
    mask = store.tagged(columns[0], tag)
    for column in columns[1:]:
        mask |= store.tagged(column, tag)
    return mask


def _of_bucket(store: LatentStore, bucket: str, mask: NDArray[np.bool_]) -> Ordinals:
    ends = store.sample_index(bucket, np.array([0, len(store.buckets[bucket])]))
    return np.flatnonzero(mask[slice(*ends.tolist())])
