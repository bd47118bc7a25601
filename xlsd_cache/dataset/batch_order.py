"""The samples of batch n, as a pure function of (bucket sizes, batch size, seed, n).

Each bucket's samples form an endless stream of random permutations, from which its batches take the
next samples; the rest of an epoch opens the first batch of the next. The batches of all buckets are
merged by due time: bucket b with n_b samples has n_b / B_b batches an epoch, and its j-th is due at
a random moment of the j-th interval of that length. So every bucket is within one batch of its
share at any time, and over K epochs each sample is used K times, plus or minus one.

A bucket with fewer samples than the batch size gives batches of all its samples. Where several
stores are mixed, a bucket's stream merges theirs in the same way, so that each store is within one
sample of its share of the bucket at any time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.dataset import rng as draw

_FRACTION = 1 << 16  # moments in an interval, as integers so that every count is exact


class Share(NamedTuple):
    """One store's share of a bucket."""

    samples: int
    weight: Fraction  # uses of each sample per epoch

    @property
    def uses(self) -> int:
        """Samples taken per epoch; at least one if the store has any."""
        return max(round(self.samples * self.weight), min(self.samples, 1))


class Slot(NamedTuple):
    """One batch of the order."""

    number: int  # 0, 1, ...
    bucket: str
    ordinals: NDArray[np.int64]  # of the bucket's live samples, in training order
    images_before: int  # samples of all earlier batches
    epoch: float  # due time of this batch, in epochs


@dataclass(frozen=True)
class _Epoch:
    """The batches of one epoch, in order."""

    first: int  # number of the first batch
    due: NDArray[np.float64]
    bucket: NDArray[np.int64]
    start: NDArray[np.int64]  # of the batch in its bucket's stream
    images_before: NDArray[np.int64]


class BatchOrder:
    """The endless sequence of batches over buckets."""

    def __init__(self, buckets: Mapping[str, int | Sequence[Share]], batch: int, seed: int) -> None:
        """An order over buckets, in batches of at most `batch` samples.

        `buckets` maps a bucket's name to its number of samples, or to the stores' shares of it,
        with the first store's samples numbered first.
        """
        shares = {
            name: [Share(found, Fraction(1))] if isinstance(found, int) else list(found)
            for name, found in buckets.items()
        }
        self.names = sorted(name for name in shares if sum(x.samples for x in shares[name]))
        self._shares = [shares[name] for name in self.names]
        samples = np.array([sum(x.samples for x in of) for of in self._shares], np.int64)
        self._counts = np.array([sum(x.uses for x in of) for of in self._shares], np.int64)
        self._sizes = np.minimum(np.minimum(self._counts, samples), batch)
        self._seed = seed
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._epoch: _Epoch | None = None

    @property
    def samples_an_epoch(self) -> int:
        """Samples used per epoch, those of a store of weight 2 counted twice."""
        return int(np.sum(self._counts))

    @property
    def batches_an_epoch(self) -> float:
        """Batches per epoch, on average."""
        return float(np.sum(self._counts / self._sizes))

    def small_buckets(self, batch: int) -> list[tuple[str, int]]:
        """(name, batch size) of the buckets with fewer samples than a batch."""
        sizes = zip(self.names, self._sizes.tolist(), strict=True)
        return [(name, size) for name, size in sizes if size < batch]

    def batches(self, epochs: int) -> int:
        """Batches due within the first `epochs` epochs."""
        return int(sum(self._due_before(epochs)))

    def images(self, epochs: int) -> int:
        """Samples in those batches."""
        return int(np.dot(self._due_before(epochs), self._sizes))

    def epoch_of(self, number: int) -> int:
        """The epoch, from 0, in which batch `number` is due."""
        epoch = int(number / self.batches_an_epoch)
        while self.batches(epoch) > number:
            epoch -= 1
        while self.batches(epoch + 1) <= number:
            epoch += 1
        return epoch

    def slot(self, number: int) -> Slot:
        """Batch `number`; further batches of the same epoch cost microseconds."""
        epoch = self._batches_of(number)
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
        """Due time of a bucket's batch j, in epochs times (samples of the bucket * _FRACTION)."""
        moment = draw.words(self._seed, f"due/{self.names[bucket]}", j) % np.uint64(_FRACTION)
        due: NDArray[np.int64] = (j * _FRACTION + moment.astype(np.int64)) * self._sizes[bucket]
        return due

    def _due_before(self, epochs: int) -> list[int]:
        """For each bucket, its batches due before the end of `epochs` epochs."""
        counts = []
        for bucket, samples in enumerate(self._counts.tolist()):
            whole = epochs * samples // int(self._sizes[bucket])  # intervals that have ended
            straddling = self._due(bucket, np.array([whole]))[0] < epochs * samples * _FRACTION
            counts.append(whole + int(straddling))
        return counts

    def _batches_of(self, number: int) -> _Epoch:
        """All batches of the epoch in which `number` is due; the last epoch asked for is kept."""
        if self._epoch and 0 <= number - self._epoch.first < len(self._epoch.due):
            return self._epoch
        epoch = self.epoch_of(number)
        starts, stops = self._due_before(epoch), self._due_before(epoch + 1)
        which = np.repeat(np.arange(len(starts)), np.subtract(stops, starts))
        within = np.concatenate([np.arange(*span) for span in zip(starts, stops, strict=True)])
        due = np.concatenate(
            [
                self._due(bucket, np.arange(*span)) / (self._counts[bucket] * _FRACTION)
                for bucket, span in enumerate(zip(starts, stops, strict=True))
            ]
        )
        order = np.argsort(due, kind="stable")  # ties go to the first bucket
        due, which, within = due[order], which[order], within[order]
        sizes = self._sizes[which]
        images_before = self.images(epoch) + np.cumsum(sizes) - sizes
        self._epoch = _Epoch(int(sum(starts)), due, which, within * sizes, images_before)
        return self._epoch

    def _stream(self, bucket: int, start: int) -> NDArray[np.int64]:
        """The samples of the batch that starts at this position of a bucket's stream."""
        count, size = self._counts.item(bucket), self._sizes.item(bucket)
        turn, place = divmod(start, count)
        head = self._order(bucket, turn)[place : place + size]
        if len(head) == size:
            return head
        return np.concatenate([head, self._order(bucket, turn + 1)[: size - len(head)]])

    def _order(self, bucket: int, turn: int) -> NDArray[np.int64]:
        """The bucket's order in one round; the last two rounds of each bucket are cached."""
        order = self._orders.get((bucket, turn))
        if order is None:
            order = self._merged(bucket, turn)
            order.setflags(write=False)  # because batches are views of it
            self._orders.pop((bucket, turn - 2), None)
            self._orders[bucket, turn] = order
        return order

    def _merged(self, bucket: int, turn: int) -> NDArray[np.int64]:
        """The stores' samples of one round, each placed at a random moment of its interval."""
        shares, first, orders, moments = self._shares[bucket], 0, [], []
        for store, share in enumerate(shares):
            name = self.names[bucket] if store == 0 else f"{self.names[bucket]}/{store}"
            uses = np.arange(turn * share.uses, (turn + 1) * share.uses)
            order = self._uses(name, share, uses)
            if len(shares) == 1:  # a single store keeps its order
                return order
            orders.append(first + order)
            moment = draw.unit(draw.words(self._seed, f"moment/{name}", uses))
            moments.append((np.arange(share.uses) + moment) / max(share.uses, 1))
            first += share.samples
        merged: NDArray[np.int64] = np.concatenate(orders)
        return merged[np.argsort(np.concatenate(moments), kind="stable")]

    def _uses(self, name: str, share: Share, uses: NDArray[np.int64]) -> NDArray[np.int64]:
        """Consecutive positions `uses` of one store's endless stream of permutations."""
        if not len(uses):
            return uses
        turns = range(uses.item(0) // share.samples, uses.item(-1) // share.samples + 1)
        stream = [draw.permutation(self._seed, f"order/{name}/{k}", share.samples) for k in turns]
        start = uses.item(0) - turns[0] * share.samples
        return np.concatenate(stream)[start : start + len(uses)]
