"""Store -> batches on the device, read and drawn one ahead by a background thread."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlsd_cache.dataset.batch_order import Slot
from xlsd_cache.dataset.dataset import LatentDataset
from xlsd_cache.dataset.rng import words
from xlsd_cache.dataset.sampler import BucketBatchSampler
from xlsd_train.data.captions import CaptionColumns, Captions
from xlsd_train.data.noise import Noising
from xlsd_train.data.noise import noise as draw_noise


@dataclass(frozen=True)
class Batch:
    """This process's part of one batch, on the device, and where the batch stands in the run."""

    number: int
    bucket: str
    epoch: float
    images_before: int  # of the run, before this batch
    images: int  # in the whole batch, over all processes
    latents: Tensor  # raw, as stored: float16 or float32 [n, C, h, w]; n may be 0 here
    noise: Tensor  # f32 [n, C, h, w]
    timesteps: Tensor  # int64 [n]
    input_ids: Tensor  # int64 [n, tokens]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; from pinned memory the copy is asynchronous."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, a: int, b: int) -> "Batch":
        """Of this process's samples those from a to b; views of them."""
        return self._with(lambda tensor: tensor[a:b])

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            latents=change(self.latents),
            noise=change(self.noise),
            timesteps=change(self.timesteps),
            input_ids=change(self.input_ids),
        )


@dataclass(frozen=True)
class BatchSource:
    """Makes any batch of the run, by its number alone."""

    dataset: LatentDataset
    sampler: BucketBatchSampler
    captions: Captions
    columns: CaptionColumns
    noising: Noising

    def make(self, slot: Slot, pin: bool = False) -> Batch:
        """Read, draw and tokenise this process's part of a batch, on the CPU."""
        ordinals, positions = self._part(slot)
        store = self.dataset.store
        shape = store.shape(slot.bucket)
        latents = torch.empty(
            (len(ordinals), *shape), dtype=getattr(torch, store.identity.dtype), pin_memory=pin
        )
        self.dataset.read(slot.bucket, ordinals, latents.numpy())
        seed = self.captions.seed
        noise = draw_noise(seed, positions, shape, self.noising.offset)
        timesteps = self.noising.timesteps(seed, slot, positions - slot.images_before)
        texts = self._texts(store.sample_index(slot.bucket, ordinals), positions, seed)
        input_ids = self.captions.tokens(texts, positions)
        if pin:
            noise, timesteps, input_ids = (
                noise.pin_memory(),
                timesteps.pin_memory(),
                input_ids.pin_memory(),
            )
        return Batch(
            slot.number,
            slot.bucket,
            slot.epoch,
            slot.images_before,
            len(slot.ordinals),
            latents,
            noise,
            timesteps,
            input_ids,
        )

    def fixed(
        self,
        bucket: str,
        ordinals: NDArray[np.int64],
        positions: NDArray[np.int64],
        timesteps: NDArray[np.int64],
        seed: int,
    ) -> Batch:
        """These live samples of a bucket, their noise and captions drawn for `positions` alone.

        To measure, not to train: captions as written, and no noise offset. Batch 0 of nothing.
        """
        store = self.dataset.store
        parts = self.captions.parts
        captions = replace(
            self.captions, seed=seed, dropout=0.0, parts=parts.plain if parts else None
        )
        texts = self._texts(store.sample_index(bucket, ordinals), positions, seed)
        return Batch(
            0,
            bucket,
            0.0,
            0,
            len(ordinals),
            torch.from_numpy(self.dataset.read(bucket, ordinals)),
            draw_noise(seed, positions, store.shape(bucket)),
            torch.from_numpy(timesteps),
            captions.tokens(texts, positions),
        )

    def keys(self, bucket: str, ordinals: NDArray[np.int64]) -> list[str]:
        """The keys of live samples of a bucket."""
        store = self.dataset.store
        keys: list[str] = (
            store.samples["key"].take(store.sample_index(bucket, ordinals)).to_pylist()
        )
        return keys

    def will_need(self, slot: Slot) -> None:
        """Have the kernel read a coming batch from the disk meanwhile."""
        store = self.dataset.store
        store.will_need(slot.bucket, store.buckets[slot.bucket][self._part(slot)[0]])

    def _part(self, slot: Slot) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ordinals, positions in the run) of this process's part of the batch."""
        numbers, positions = self.sampler.part(slot)
        return self.dataset.selection.ordinals(slot.bucket, numbers), positions

    def lengths(self, most: int) -> NDArray[np.int64]:
        """How many tokens captions would be if none were cut; 0 for samples that have none.

        Of all selected samples, or where there are more of a random `most` of them.
        """
        seed, count = self.captions.seed, len(self.dataset)
        numbers = np.arange(min(count, most))
        if count > most:
            drawn = words(seed, "caption lengths", numbers) % np.uint64(count)
            numbers = np.unique(drawn).astype(np.int64)
        texts = self._texts(self.dataset.selection.rows(self.dataset.store, numbers), numbers, seed)
        lengths = self.captions.lengths(self.captions.lines(texts, numbers))
        lengths[[not text for text in texts]] = 0
        return lengths

    def _texts(
        self, rows: NDArray[np.int64], positions: NDArray[np.int64], seed: int
    ) -> list[str | None]:
        """Of each sample, by its row of `store.samples`, the text of the column that is drawn."""
        texts = [self.dataset.texts(name, rows) for name in self.columns.names]
        return self.columns.mix(texts, words(seed, "caption column", positions))


class Loader:
    """Batches first..last-1 in order; two are ready or under way while one is used.

    A thread and no worker processes: handing tensors between processes costs ten times what
    reading them does.
    """

    AHEAD = 2
    HINTED = 4  # batches ahead of their reading that the kernel is told of

    def __init__(self, source: BatchSource, first: int, last: int, device: torch.device) -> None:
        self._source, self._span, self._device = source, range(first, last), device
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self.AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()
        self.wait_s = 0.0  # time that taking batches has waited for the disk and the tokeniser

    def __iter__(self) -> Iterator[Batch]:
        while True:
            begun = time.perf_counter()
            item = self._ready.get()
            self.wait_s += time.perf_counter() - begun
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item.to(self._device)

    def close(self) -> None:
        """End the thread; batches not taken are dropped, and made again when asked for again."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _fill(self) -> None:
        pin = self._device.type == "cuda"
        order = self._source.sampler.order
        try:
            slots: list[Slot] = []
            for number in self._span:
                while len(slots) <= self.HINTED and number + len(slots) < self._span.stop:
                    slots.append(order.slot(number + len(slots)))
                    self._source.will_need(slots[-1])
                if self._closed.is_set():
                    return
                self._ready.put(self._source.make(slots.pop(0), pin))
            self._ready.put(None)
        except BaseException as error:  # it belongs to whoever takes the batches
            self._ready.put(error)
