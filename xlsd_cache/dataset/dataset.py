"""A latent store as a torch map-style dataset, for any training loop."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from xlsd_cache.dataset.selection import Mask, Ordinals, SampleStore, Selection, select
from xlsd_cache.errors import UserError


class Sample(TypedDict):
    """One image of a LatentDataset."""

    latents: Tensor  # [C, h, w]: f32 and scaled, or raw in the store's dtype
    caption: str  # as stored: several lines are alternatives; empty where there is none
    key: str  # the image's path below its source


class LatentDataset(Dataset[Sample]):
    """The live samples of a store, sorted by bucket: scaled latents, caption and key of each.

    Samples of one bucket have one shape, so that a BucketBatchSampler's batches collate. A batch is
    one read of the store (`__getitems__`, which torch's DataLoader calls). Picklable where the
    store is, and safe under fork and spawn.
    """

    def __init__(
        self,
        store: SampleStore,
        caption: str | None = None,
        *,
        scaled: bool = True,
        selection: Selection | Mask | None = None,
    ) -> None:
        """A dataset over a store, or over those of its samples that are selected.

        Args:
            store: a LatentStore, or what reads like one.
            caption: the caption column; by default the store's only one, or none where it has none.
            scaled: give (latents - shift_factor) * scaling_factor, which a UNet trains on, as f32
                instead of the raw latents [C, h, w] in the store's dtype.
            selection: a mask of the rows of `store.samples`, e.g. `~store.tagged("txt", "sketch")`.

        Raises UserError where the store has no such column, or has several and none is given.

        """
        columns = store.caption_columns
        if caption is None and len(columns) > 1:
            raise UserError(f"{store.root} has the caption columns {', '.join(columns)}: give one")
        if caption is not None and caption not in columns:
            raise UserError(
                f"{store.root} has no caption column {caption!r} (it has "
                f"{', '.join(columns) or 'none'})"
            )
        if selection is None:
            selection = select(store, np.ones(len(store), np.bool_))
        elif not isinstance(selection, Selection):
            selection = select(store, selection)
        self.store, self.scaled, self.selection = store, scaled, selection
        self.caption = caption or next(iter(columns), None)

    def __len__(self) -> int:
        """Selected samples of all buckets."""
        return len(self.selection)

    def __getitem__(self, index: int) -> Sample:
        """One sample, by its number among the selected ones. Raises IndexError beyond them."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples, with one read of the store for each bucket among them.

        Raises UserError where a latent is missing or its checksum is wrong.
        """
        wanted = np.asarray(indices, np.int64)
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"index out of range: the dataset has {len(self)} samples")
        samples: list[Sample] = [Sample(latents=torch.empty(0), caption="", key="")] * len(wanted)
        for bucket, places, numbers in self.selection.by_bucket(wanted):
            ordinals = self.selection.ordinals(bucket, numbers)
            latents = torch.from_numpy(self.read(bucket, ordinals))
            if self.scaled:
                identity = self.store.identity
                latents = (latents.float() - identity.shift_factor) * identity.scaling_factor
            rows = self.store.sample_index(bucket, ordinals)
            texts = self.texts(self.caption, rows) if self.caption else [None] * len(rows)
            keys = self.texts("key", rows)
            for place, latent, text, key in zip(places.tolist(), latents, texts, keys, strict=True):
                samples[place] = Sample(latents=latent, caption=text or "", key=key or "")
        return samples

    def read(
        self, bucket: str, ordinals: Ordinals, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Raw latents [n, C, h, w] of live samples of a bucket, in the store's dtype."""
        return self.store.read(bucket, self.store.buckets[bucket][ordinals], out)

    def texts(self, column: str, rows: Ordinals) -> list[str | None]:
        """A column of `store.samples` at these rows."""
        values = self.store.samples[column]
        return [values[row].as_py() for row in rows.tolist()]
