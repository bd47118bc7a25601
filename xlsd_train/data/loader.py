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

from xlsd_cache.dataset.batch_order import Schedule, Slot
from xlsd_cache.dataset.rng import words
from xlsd_train.data.captions import CaptionColumns, Captions
from xlsd_train.data.mixture import Store
from xlsd_train.data.noise import Noising
from xlsd_train.data.noise import noise as draw_noise
from xlsd_train.data.selection import Selection


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

    store: Store
    selection: Selection
    schedule: Schedule  # over what is selected
    captions: Captions
    columns: CaptionColumns
    noising: Noising
    rank: int
    processes: int

    def make(self, slot: Slot, pin: bool = False) -> Batch:
        """Read, draw and tokenise this process's part of a batch, on the CPU."""
        ordinals, positions, rows = self._part(slot)
        shape = self.store.shape(slot.bucket)
        latents = torch.empty(
            (len(rows), *shape),
            dtype=getattr(torch, self.store.identity.dtype),
            pin_memory=pin,
        )
        self.store.read(slot.bucket, rows, latents.numpy())
        seed = self.captions.seed
        noise = draw_noise(seed, positions, shape, self.noising.offset)
        timesteps = self.noising.timesteps(seed, slot, positions - slot.images_before)
        texts = self._texts(self.store.sample_index(slot.bucket, ordinals), positions, seed)
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
        rows = self.store.buckets[bucket][ordinals]
        parts = self.captions.parts
        captions = replace(
            self.captions, seed=seed, dropout=0.0, parts=parts.plain if parts else None
        )
        texts = self._texts(self.store.sample_index(bucket, ordinals), positions, seed)
        return Batch(
            0,
            bucket,
            0.0,
            0,
            len(rows),
            torch.from_numpy(self.store.read(bucket, rows)),
            draw_noise(seed, positions, self.store.shape(bucket)),
            torch.from_numpy(timesteps),
            captions.tokens(texts, positions),
        )

    def keys(self, bucket: str, ordinals: NDArray[np.int64]) -> list[str]:
        """The keys of live samples of a bucket."""
        keys: list[str] = (
            self.store.samples["key"].take(self.store.sample_index(bucket, ordinals)).to_pylist()
        )
        return keys

    def will_need(self, slot: Slot) -> None:
        """Have the kernel read a coming batch from the disk meanwhile."""
        self.store.will_need(slot.bucket, self._part(slot)[2])

    def _part(self, slot: Slot) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]:
        """(ordinals, positions in the run, rows) of this rank's share of the batch."""
        count = len(slot.ordinals)
        begin = count * self.rank // self.processes
        end = count * (self.rank + 1) // self.processes
        ordinals = self.selection.ordinals(slot.bucket, slot.ordinals[begin:end])
        positions = slot.images_before + np.arange(begin, end)
        return ordinals, positions, self.store.buckets[slot.bucket][ordinals]

    def lengths(self, most: int) -> NDArray[np.int64]:
        """How many tokens captions would be if none were cut; 0 for samples that have none.

        Of all selected samples, or where there are more of a random `most` of them.
        """
        seed, count = self.captions.seed, len(self.selection)
        numbers = np.arange(min(count, most))
        if count > most:
            drawn = words(seed, "caption lengths", numbers) % np.uint64(count)
            numbers = np.unique(drawn).astype(np.int64)
        texts = self._texts(self.selection.rows(self.store, numbers), numbers, seed)
        lengths = self.captions.lengths(self.captions.lines(texts, numbers))
        lengths[[not text for text in texts]] = 0
        return lengths

    def _texts(
        self, rows: NDArray[np.int64], positions: NDArray[np.int64], seed: int
    ) -> list[str | None]:
        """Of each sample, by its row of `store.samples`, the text of the column that is drawn."""
        columns = [self.store.samples[name] for name in self.columns.names]
        texts = [[column[row].as_py() for row in rows.tolist()] for column in columns]
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
        schedule = self._source.schedule
        try:
            slots: list[Slot] = []
            for number in self._span:
                while len(slots) <= self.HINTED and number + len(slots) < self._span.stop:
                    slots.append(schedule.slot(number + len(slots)))
                    self._source.will_need(slots[-1])
                if self._closed.is_set():
                    return
                self._ready.put(self._source.make(slots.pop(0), pin))
            self._ready.put(None)
        except BaseException as error:  # it belongs to whoever takes the batches
            self._ready.put(error)
