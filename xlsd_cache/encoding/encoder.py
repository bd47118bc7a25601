"""Encodes uint8 pixels to raw latents: scales them to [-1,1], fits the batch to the device."""

import ctypes
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlsd_cache.encoding.vae import Vae
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.gpu_memory import free_on, give_back, is_full
from xlsd_cache.vocabulary import Precision

log = logging.getLogger("xlsd.cache.encoding")


IN_FLIGHT = 2  # calls on a GPU: the next one is queued while the first computes
MOST = 16  # images a call on a GPU


def to_input(pixels: Tensor) -> Tensor:  # uint8 [B,H,W,3] -> f32 [B,3,H,W] in [-1,1]
    """Scale pixels to the VAE's range: 2 * (p / 255) - 1.

    Rounding is that of diffusers' VaeImageProcessor. The memory layout decides in what order
    kernels sum. On a CPU it is diffusers' (channels last), which is also the faster one, so that
    latents equal diffusers' bit for bit. On a GPU it is the weights' own (contiguous), so that all
    convolutions share one: CUDA's group norm returns no other. The two differ by rounding.
    """
    planes = pixels.permute(0, 3, 1, 2)
    if pixels.device.type != "cpu":
        planes = planes.contiguous()  # of uint8: a quarter of the bytes
    return (2.0 * (planes.float() / 255.0)) - 1.0


@dataclass
class Encoder:
    """A VAE on a device, with its precision and batch size."""

    vae: Vae
    precision: Precision
    device: torch.device
    batch: int = 8  # images a call
    calls: int = 1  # concurrent
    full_at: float = math.inf  # pixels of a call that ran out of memory
    on_full: Callable[[], None] = lambda: None  # called where `full_at` has shrunk
    _launching: Lock = field(default_factory=Lock, init=False)
    _shrinking: Lock = field(default_factory=Lock, init=False)

    def __post_init__(self) -> None:
        self.vae.model.to(self.device)

    @property
    def name(self) -> str:
        """Of the device."""
        if self.device.type == "cpu":
            return "the CPU"
        return str(torch.cuda.get_device_name(self.device))

    def __str__(self) -> str:
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        text = f"encoding on {self.name}: {self.calls} x {images} at once"
        if self.device.type != "cpu":
            return text
        each = torch.get_num_threads() // self.calls
        return f"{text}, {'1 thread' if each == 1 else f'{each} threads'} each"

    @classmethod
    def fitted(
        cls, vae: Vae, precision: Precision, device: torch.device, batch: int | None, pixels: int
    ) -> "Encoder":
        """An encoder with the fastest batch size for images of up to `pixels` pixels.

        On a CPU that is one image for each core: threads that share a convolution wait for each
        other, and more images at once do not fit its cache. A given `batch` is encoded in one call,
        with all threads. On a GPU it is the largest power of two, up to MOST, that fits the free
        memory. The two calls in flight need the memory of one, as their kernels run in turn.
        """
        free = free_on(device)
        if batch is not None:
            return cls(vae, precision, device, batch, 1 if free is None else IN_FLIGHT)
        # At full resolution about six fp32 tensors of the first width live at once.
        nbytes = 6 * 4 * pixels * vae.model.config["block_out_channels"][0]
        if free is not None:
            fitting = max(1, int(free * 0.7 / nbytes))
            batch = min(MOST, 2 ** (fitting.bit_length() - 1))
            return cls(vae, precision, device, batch, IN_FLIGHT)
        fitting = int(psutil.virtual_memory().available * 0.7 / nbytes)
        return cls(vae, precision, device, 1, max(1, min(torch.get_num_threads(), fitting)))

    @contextmanager
    def threads(self, spare: int) -> Iterator[ThreadPoolExecutor]:
        """A pool of `calls` + `spare` threads for `encode`; the calls divide torch's threads."""
        if self.device.type == "cpu":
            _keep_freed_memory()
        before = torch.get_num_threads()
        each = (max(1, before // self.calls),)  # torchrun sets one, and a GPU has two calls
        with ThreadPoolExecutor(self.calls + spare, "encoder", torch.set_num_threads, each) as pool:
            yield pool
        torch.set_num_threads(before)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B,H,W,3] -> raw latents f32 [B,C,H/8,W/8], the posterior's mean.

        A batch that runs out of GPU memory is encoded in halves, and so are all later ones of its
        size. Raises UserError where a single image does not fit: tiles would, but their latents
        differ near every seam.
        """
        count, height, width = pixels.shape[:3]
        if count == 1 or count * height * width < self.full_at:
            try:
                return self._encode(pixels)
            except RuntimeError as error:
                if not is_full(error):
                    raise
                if count == 1:
                    raise UserError(
                        f"not enough GPU memory to encode one image of {width}x{height}; free "
                        f"some, lower --resolution, or use --device cpu"
                    ) from error
            self._shrink(count, height, width)
            give_back(self.device)
        return np.concatenate([self.encode(half) for half in np.array_split(pixels, 2)])

    def _shrink(self, count: int, height: int, width: int) -> None:
        """Remember what does not fit. Two calls in flight may find out about the same size."""
        with self._shrinking:
            if count * height * width >= self.full_at:
                return
            self.full_at = count * height * width
            log.info(
                f"{count} images of {width}x{height} do not fit the GPU's memory: halving the "
                f"batch from here on"
            )
            self.on_full()

    @torch.inference_mode()
    def _encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(pixels)
        if self.device.type == "cpu":
            return self._latents(batch).numpy()
        batch = batch.pin_memory()  # of torch's cache of pinned memory, as is the result
        # Launching takes milliseconds. What a call frees at its end, the next one launched takes:
        # so one call's memory is enough for all in flight.
        with self._launching:
            latents = self._latents(batch.to(self.device, non_blocking=True))
            latents = latents.to("cpu", non_blocking=True)
            # Blocking leaves the core to the decoders.
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(self.device))
        copied.synchronize()  # device sync, of this call alone
        return latents.numpy()

    def _latents(self, batch: Tensor) -> Tensor:  # uint8 [B,H,W,3] -> f32 [B,C,H/8,W/8]
        bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self.vae.encode(to_input(batch)).float()


def _keep_freed_memory() -> None:
    """Make glibc keep the memory that a layer frees, in one heap for all threads.

    By default it returns pages to the kernel after every layer and gets zeroed ones back, which
    took an eighth of a small VAE's time. Does nothing with another C library.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
    with suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        for parameter, value in (
            (trim_threshold, 2**31 - 1),
            (mmap_threshold, 2**25),  # the most that glibc takes; larger tensors are still mapped
            (arena_max, 1),
        ):
            libc.mallopt(parameter, value)
