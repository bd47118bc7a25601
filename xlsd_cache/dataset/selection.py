"""Which samples of a store are used: a mask of its rows, kept as ordinals by bucket."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xlsd_cache.dataset.batch_order import Share
from xlsd_cache.store.identity import Identity

Ordinals = NDArray[np.int64]  # of a bucket's live samples, in the order of `samples`
Mask = NDArray[np.bool_]  # of the rows of `samples`


class SampleStore(Protocol):
    """What reading samples needs: a LatentStore, or several of them mixed."""

    def __len__(self) -> int: ...

    @property
    def root(self) -> Path | str:
        """Where it lies, for messages."""
        ...

    @property
    def identity(self) -> Identity:
        """What the latents are valid for."""
        ...

    @property
    def buckets(self) -> dict[str, Ordinals]:
        """What `read` takes of each bucket's live samples."""
        ...

    @property
    def samples(self) -> pa.Table:
        """Arrow table of the live samples, sorted by bucket."""
        ...

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns of `samples` that are captions."""
        ...

    def shape(self, bucket: str) -> tuple[int, int, int]:
        """(C, h, w) of a bucket's latents."""
        ...

    def sample_index(self, bucket: str, ordinals: Ordinals) -> Ordinals:
        """Rows of `samples` for the n-th live samples of a bucket."""
        ...

    def read(
        self, bucket: str, rows: Sequence[int] | Ordinals, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Raw latents [n, C, h, w]."""
        ...

    def will_need(self, bucket: str, rows: Sequence[int] | Ordinals) -> None:
        """Start reading into the page cache."""
        ...

    def tagged(self, column: str, tag: str) -> Mask:
        """Which rows of `samples` have a tag."""
        ...

    def shares(self, chosen: Mapping[str, Ordinals] | None) -> Mapping[str, int | Sequence[Share]]:
        """How many samples of each bucket are chosen, or its stores' shares."""
        ...


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

    def by_bucket(self, indices: Ordinals) -> list[tuple[str, Ordinals, Ordinals]]:
        """(bucket, places in `indices`, numbers within the bucket), for each bucket of any.

        `indices` count the selected samples through all buckets.
        """
        names = list(self.sizes)
        starts = np.cumsum([0, *self.sizes.values()])
        bucket = np.searchsorted(starts, indices, side="right") - 1
        return [
            (names[i], places, indices[places] - starts[i])
            for i in np.unique(bucket).tolist()
            for places in (np.flatnonzero(bucket == i),)
        ]

    def rows(self, store: SampleStore, indices: Ordinals) -> Ordinals:
        """Rows of `store.samples` of selected samples, counted through all buckets."""
        rows = np.empty(len(indices), np.int64)
        for name, places, numbers in self.by_bucket(indices):
            rows[places] = store.sample_index(name, self.ordinals(name, numbers))
        return rows


def select(store: SampleStore, mask: Mask) -> Selection:
    """The samples for which a mask is true."""
    if mask.all():
        return Selection({name: len(rows) for name, rows in store.buckets.items()}, len(store))
    chosen = {name: _of_bucket(store, name, mask) for name in store.buckets}
    chosen = {name: ordinals for name, ordinals in chosen.items() if len(ordinals)}
    sizes = {name: len(ordinals) for name, ordinals in chosen.items()}
    return Selection(sizes, len(store), chosen)


def _of_bucket(store: SampleStore, bucket: str, mask: Mask) -> Ordinals:
    ends = store.sample_index(bucket, np.array([0, len(store.buckets[bucket])]))
    return np.flatnonzero(mask[slice(*ends.tolist())])
