"""Prefetch batches to the device in a background thread."""

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
from xlsd_train.data.captions import CaptionColumns, Captions, token_counts
from xlsd_train.data.noise import Noising
from xlsd_train.data.noise import noise as draw_noise


@dataclass(frozen=True)
class Batch:
    """This process's part of a batch, and the batch's position in the run."""

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
        """The batch on another device; the copy from pinned memory is asynchronous."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, a: int, b: int) -> "Batch":
        """Views of this process's samples a to b."""
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
    """Makes any batch of the run from its slot in the batch order."""

    dataset: LatentDataset
    sampler: BucketBatchSampler
    captions: Captions
    columns: CaptionColumns
    noising: Noising

    def make(self, slot: Slot, pin: bool = False) -> Batch:
        """Read, draw and tokenise this process's part of a batch, on the CPU, pinned on request."""
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
        """A batch for validation: these live samples of a bucket, with noise by `positions` alone.

        Captions are as written, without random edits, and there is no noise offset.
        """
        store = self.dataset.store
        edits = self.captions.edits
        captions = replace(
            self.captions, seed=seed, dropout=0.0, edits=edits.deterministic if edits else None
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
        """Have the kernel start reading a coming batch from the disk."""
        store = self.dataset.store
        store.will_need(slot.bucket, store.buckets[slot.bucket][self._part(slot)[0]])

    def _part(self, slot: Slot) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ordinals, positions in the run) of this process's part of the batch."""
        numbers, positions = self.sampler.part(slot)
        return self.dataset.selection.ordinals(slot.bucket, numbers), positions

    def lengths(self, most: int) -> NDArray[np.int64]:
        """Tokens of captions without truncation, 0 for samples without a caption.

        For all selected samples, or a random `most` of them.
        """
        seed, count = self.captions.seed, len(self.dataset)
        numbers = np.arange(min(count, most))
        if count > most:
            drawn = words(seed, "caption lengths", numbers) % np.uint64(count)
            numbers = np.unique(drawn).astype(np.int64)
        texts = self._texts(self.dataset.selection.rows(self.dataset.store, numbers), numbers, seed)
        lengths = token_counts(self.captions.tokenizer, self.captions.lines(texts, numbers))
        lengths[[not text for text in texts]] = 0
        return lengths

    def _texts(
        self, rows: NDArray[np.int64], positions: NDArray[np.int64], seed: int
    ) -> list[str | None]:
        """A text for each row of `store.samples`, from a column drawn by weight."""
        texts = [self.dataset.texts(name, rows) for name in self.columns.names]
        return self.columns.mix(texts, words(seed, "caption column", positions))


class Loader:
    """Batches first..last-1 in order, two of them prefetched.

    Uses a thread, not worker processes: passing tensors between processes costs ten times as much
    as reading them.
    """

    AHEAD = 2
    HINTED = 4  # batches beyond those that the kernel starts to read

    def __init__(self, source: BatchSource, first: int, last: int, device: torch.device) -> None:
        self._source, self._span, self._device = source, range(first, last), device
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self.AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()
        self.wait_s = 0.0  # total time that the consumer waited for batches

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
        """End the thread; prefetched batches are dropped."""
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
        except BaseException as error:  # raised in the consumer
            self._ready.put(error)
