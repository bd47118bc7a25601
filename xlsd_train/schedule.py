"""Which samples make batch number n: a pure function of (bucket sizes, batch size, seed, n).

Each bucket's samples form an endless stream, one random order after another, from which its batches
take what comes next; an epoch's tail opens the first batch of the next. Batches of all buckets are
merged by the time they are due: bucket b, holding n_b samples, owes n_b / B_b batches an epoch, and
its j-th falls at a random moment of the j-th such interval. So at any time every bucket is within
one batch of its share, and over K epochs each sample is used K times, give or take one.

A bucket with fewer samples than the batch gives batches of all its samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlsd_train import draw

_FRACTION = 1 << 16  # the moments within an interval, as integers so that every count is exact


class Slot(NamedTuple):
    """One batch of the schedule."""

    number: int  # 0, 1, ...
    bucket: str
    ordinals: NDArray[np.int64]  # of the bucket's live samples, in training order
    images_before: int  # samples of all earlier batches
    epoch: float  # when this batch is due


@dataclass(frozen=True)
class _Epoch:
    """The batches of one epoch, in order."""

    first: int  # number of the first batch
    due: NDArray[np.float64]
    bucket: NDArray[np.int64]
    start: NDArray[np.int64]  # of the batch in its bucket's stream
    images_before: NDArray[np.int64]


class Schedule:
    """The endless sequence of batches over a store's buckets."""

    def __init__(self, buckets: Mapping[str, int], batch: int, seed: int) -> None:
        """`buckets` maps names to numbers of samples; `batch` is the most a batch may hold."""
        self.names = sorted(name for name, count in buckets.items() if count)
        self._counts = np.array([buckets[name] for name in self.names], np.int64)
        self._sizes = np.minimum(self._counts, batch)
        self._seed = seed
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._epoch: _Epoch | None = None

    @property
    def batches_an_epoch(self) -> float:
        """On average."""
        return float(np.sum(self._counts / self._sizes))

    def small_buckets(self, batch: int) -> list[tuple[str, int]]:
        """(name, samples) of the buckets that cannot fill a batch."""
        counts = zip(self.names, self._counts.tolist(), strict=True)
        return [(name, count) for name, count in counts if count < batch]

    def batches(self, epochs: int) -> int:
        """How many batches are due within the first `epochs` epochs."""
        return int(sum(self._due_before(epochs)))

    def images(self, epochs: int) -> int:
        """How many samples those batches hold."""
        return int(np.dot(self._due_before(epochs), self._sizes))

    def slot(self, number: int) -> Slot:
        """Batch `number`; those that follow in the same epoch cost microseconds."""
        epoch = self._epoch_of(number)
        at = number - epoch.first
        bucket = epoch.bucket.item(at)
        return Slot(
            number,
            self.names[bucket],
            self._stream(bucket, epoch.start.item(at)),
            epoch.images_before.item(at),
            epoch.due.item(at),
        )

    def _due(self, bucket: int, j: NDArray[np.int64]) -> NDArray[np.int64]:
        """When batch j of a bucket is due, in epochs times (samples of the bucket * _FRACTION)."""
        moment = draw.words(self._seed, f"due/{self.names[bucket]}", j) % np.uint64(_FRACTION)
        due: NDArray[np.int64] = (j * _FRACTION + moment.astype(np.int64)) * self._sizes[bucket]
        return due

    def _due_before(self, epochs: int) -> list[int]:
        """For each bucket, how many of its batches are due before the end of `epochs` epochs."""
        counts = []
        for bucket, samples in enumerate(self._counts.tolist()):
            whole = epochs * samples // int(self._sizes[bucket])  # intervals that have ended
            straddling = self._due(bucket, np.array([whole]))[0] < epochs * samples * _FRACTION
            counts.append(whole + int(straddling))
        return counts

    def _epoch_of(self, number: int) -> _Epoch:
        """The epoch in which batch `number` is due; the last one asked for is kept."""
        if self._epoch and 0 <= number - self._epoch.first < len(self._epoch.due):
            return self._epoch
        epoch = int(number / self.batches_an_epoch)
        while self.batches(epoch) > number:
            epoch -= 1
        while self.batches(epoch + 1) <= number:
            epoch += 1
        starts, stops = self._due_before(epoch), self._due_before(epoch + 1)
        which = np.repeat(np.arange(len(starts)), np.subtract(stops, starts))
        within = np.concatenate([np.arange(*span) for span in zip(starts, stops, strict=True)])
        due = np.concatenate(
            [
                self._due(bucket, np.arange(*span)) / (self._counts[bucket] * _FRACTION)
                for bucket, span in enumerate(zip(starts, stops, strict=True))
            ]
        )
        order = np.argsort(due, kind="stable")  # of those due at once, the first bucket's first
        due, which, within = due[order], which[order], within[order]
        sizes = self._sizes[which]
        images_before = self.images(epoch) + np.cumsum(sizes) - sizes
        self._epoch = _Epoch(int(sum(starts)), due, which, within * sizes, images_before)
        return self._epoch

    def _stream(self, bucket: int, start: int) -> NDArray[np.int64]:
        """The samples of the batch that starts here in a bucket's endless stream."""
        count, size = self._counts.item(bucket), self._sizes.item(bucket)
        turn, place = divmod(start, count)
        head = self._order(bucket, turn)[place : place + size]
        if len(head) == size:
            return head
        return np.concatenate([head, self._order(bucket, turn + 1)[: size - len(head)]])

    def _order(self, bucket: int, turn: int) -> NDArray[np.int64]:
        """The bucket's random order in one round; the last two rounds of each are kept."""
        order = self._orders.get((bucket, turn))
        if order is None:
            purpose = f"order/{self.names[bucket]}/{turn}"
            order = draw.permutation(self._seed, purpose, int(self._counts[bucket]))
            order.setflags(write=False)  # batches are views of it
            self._orders.pop((bucket, turn - 2), None)
            self._orders[bucket, turn] = order
        return order
