"""Store -> batches on the device, read and drawn one ahead by a background thread."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlsd_cache.store import LatentStore
from xlsd_train import draw
from xlsd_train.captions import Captions
from xlsd_train.schedule import Schedule, Slot
from xlsd_train.selection import Selection


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
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("latents", "noise", "timesteps", "input_ids")
        }
        return Batch(**{**self.__dict__, **moved})


@dataclass(frozen=True)
class Noising:
    """How the noise and the timesteps of batches are drawn."""

    first: int  # the first timestep, and how many there are: an objective's
    count: int
    stratified: bool = False  # spread evenly over each batch
    offset: float = 0.0  # of the noise's mean by channel

    def timesteps(
        self, seed: int, slot: Slot, places: NDArray[np.int64]
    ) -> Tensor:  # int64 [n], of these places in the batch
        """As drawn for these places of a batch, whoever asks for which part of it."""
        if self.stratified:
            size = len(slot.ordinals)
            drawn = draw.stratified_timesteps(seed, slot.number, size, places, self.count)
        else:
            drawn = draw.timesteps(seed, slot.images_before + places, self.count)
        return drawn + self.first


@dataclass(frozen=True)
class BatchSource:
    """Makes any batch of the run, by its number alone."""

    store: LatentStore
    selection: Selection
    schedule: Schedule  # over what is selected
    captions: Captions
    column: str | None  # caption column; None trains without captions
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
        noise = draw.noise(seed, positions, shape, self.noising.offset)
        timesteps = self.noising.timesteps(seed, slot, positions - slot.images_before)
        input_ids = self.captions.tokens(self._texts(slot.bucket, ordinals), positions)
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

        To measure, not to train: no caption is dropped and no noise offset. Batch 0 of nothing.
        """
        rows = self.store.buckets[bucket][ordinals]
        captions = replace(self.captions, seed=seed, dropout=0.0)
        return Batch(
            0,
            bucket,
            0.0,
            0,
            len(rows),
            torch.from_numpy(self.store.read(bucket, rows)),
            draw.noise(seed, positions, self.store.shape(bucket)),
            torch.from_numpy(timesteps),
            captions.tokens(self._texts(bucket, ordinals), positions),
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

    def _texts(
        self, bucket: str, ordinals: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> list[str | None]:
        if self.column is None:
            return [None] * len(ordinals)
        texts = self.store.samples[self.column]
        return [texts[int(i)].as_py() for i in self.store.sample_index(bucket, ordinals)]


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
