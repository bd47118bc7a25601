"""Batches of a LatentDataset, each of one bucket: seeded, resumable and shared among processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch.distributed
from torch.utils.data import Sampler

from xlsd_cache.dataset.batch_order import BatchOrder, Slot
from xlsd_cache.dataset.dataset import LatentDataset
from xlsd_cache.dataset.selection import Ordinals


class Part(NamedTuple):
    """This process's part of a batch."""

    numbers: Ordinals  # of the samples, within the selected ones of the batch's bucket
    positions: Ordinals  # of the samples in the whole run: 0 is the first image of batch 0


class BucketBatchSampler(Sampler[list[int]]):
    """A batch sampler for a LatentDataset: batch n is a pure function of (dataset, seed, n).

    Give it to a DataLoader as `batch_sampler`. One iteration is one epoch, and the next goes on
    with the next epoch in another order. Batches of all buckets are mixed in proportion to their
    sizes; what is left of a bucket at the end of an epoch opens its first batch of the next, so
    every image is used once an epoch on average and batches are full.
    """

    drop_last = False  # as accelerate asks of a batch sampler

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        seed: int = 0,
        *,
        start: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """The batches from `start` on.

        Args:
            dataset: whose samples are used.
            batch_size: images of a batch, over all processes; a bucket of fewer gives smaller ones.
            seed: of the order.
            start: the number of the first batch; to resume, how many batches were trained on.
            rank: which process this is, by default torch.distributed's, or 0. Leave it 0 of 1
                where accelerate's `prepare` shares the batches out.
            world_size: how many processes share each batch, by default torch.distributed's, or 1.

        Raises ValueError for a batch size, a start or a rank that cannot be.

        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        if world_size is None:
            world_size = torch.distributed.get_world_size() if distributed else 1
        if batch_size < 1 or start < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size} must be at least 1, start {start} at least 0, and rank "
                f"{rank} from 0 to below world_size {world_size}"
            )
        self.dataset, self.batch_size, self.start = dataset, batch_size, start
        self.rank, self.world_size = rank, world_size
        selection = dataset.selection
        self.order = BatchOrder(dataset.store.shares(selection.chosen), batch_size, seed)
        starts = np.cumsum([0, *selection.sizes.values()]).tolist()
        self._starts = dict(zip(selection.sizes, starts, strict=False))

    def __len__(self) -> int:
        """How many batches an iteration that begins now has."""
        return self._stop() - self.start if len(self.dataset) else 0

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of the dataset, a list for each batch, from `start` to the end of its epoch.

        Raises ValueError where a bucket has fewer samples than there are processes.
        """
        if not len(self.dataset):
            return
        if small := self.order.small_buckets(self.world_size):
            raise ValueError(
                f"bucket {small[0][0]} has {small[0][1]} samples, fewer than the {self.world_size} "
                f"processes that share each batch: leave it out of the dataset's selection"
            )
        stop = self._stop()
        for number in range(self.start, stop):
            slot = self.order.slot(number)
            yield (self._starts[slot.bucket] + self.part(slot).numbers).tolist()
        self.start = stop

    def part(self, slot: Slot) -> Part:
        """This process's contiguous part of a batch; sizes differ by one image at most."""
        count = len(slot.ordinals)
        begin = count * self.rank // self.world_size
        end = count * (self.rank + 1) // self.world_size
        return Part(slot.ordinals[begin:end], slot.images_before + np.arange(begin, end))

    def _stop(self) -> int:
        return self.order.batches(self.order.epoch_of(self.start) + 1)
