"""Encodes uint8 pixels to raw latents: scales them to [-1,1], fits the batch to the device."""

import ctypes
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlsd_cache.encoding.vae import Vae
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.gpu_memory import give_back, is_full, most_on
from xlsd_cache.vocabulary import Precision

log = logging.getLogger("xlsd.cache.encoding")


def to_input(pixels: Tensor) -> Tensor:  # uint8 [B,H,W,3] -> f32 [B,3,H,W] in [-1,1]
    """Scale pixels to the VAE's range: 2 * (p / 255) - 1.

    Rounding and memory layout (channels last) are those of diffusers' VaeImageProcessor, so that
    latents equal diffusers' bit for bit: the layout decides in what order kernels sum. On a CPU it
    is also the faster one.
    """
    return (2.0 * (pixels.permute(0, 3, 1, 2).float() / 255.0)) - 1.0


@dataclass
class Encoder:
    """A VAE on a device, with its precision and batch size."""

    vae: Vae
    precision: Precision
    device: torch.device
    batch: int = 8  # images a call
    calls: int = 1  # concurrent
    _full_at: float = field(default=math.inf, init=False)  # pixels a call that ran out of memory

    def __post_init__(self) -> None:
        self.vae.model.to(self.device)

    def __str__(self) -> str:
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        if self.device.type == "cpu":
            each = torch.get_num_threads() // self.calls
            threads = "1 thread" if each == 1 else f"{each} threads"
            return f"encoding on the CPU: {self.calls} x {images} at once, {threads} each"
        return f"encoding on {torch.cuda.get_device_name(self.device)}: {images} at once"

    @classmethod
    def fitted(
        cls, vae: Vae, precision: Precision, device: torch.device, batch: int | None, pixels: int
    ) -> "Encoder":
        """An encoder with the fastest batch size for images of up to `pixels` pixels.

        On a CPU that is one image for each core: threads that share a convolution wait for each
        other, and more images at once do not fit its cache. On a GPU it is the largest batch that
        fits, up to 32. A given `batch` is encoded in one call, with all threads.
        """
        if batch is not None:
            return cls(vae, precision, device, batch)
        # At full resolution about six fp32 tensors of the first width live at once.
        nbytes = 6 * 4 * pixels * vae.model.config["block_out_channels"][0]
        if device.type == "cuda":
            usable = most_on(device) * 0.7
            return cls(vae, precision, device, 2 ** min(5, max(0, int(math.log2(usable / nbytes)))))
        fitting = int(psutil.virtual_memory().available * 0.7 / nbytes)
        return cls(vae, precision, device, 1, max(1, min(torch.get_num_threads(), fitting)))

    @contextmanager
    def threads(self, spare: int) -> Iterator[ThreadPoolExecutor]:
        """A pool of `calls` + `spare` threads for `encode`; the calls divide torch's threads."""
        if self.device.type == "cpu":
            _keep_freed_memory()
        before = torch.get_num_threads()
        each = (before // self.calls,)
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
        if count == 1 or count * height * width < self._full_at:
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
            log.info(
                f"{count} images of {width}x{height} do not fit the GPU's memory: halving the "
                f"batch from here on"
            )
            self._full_at = count * height * width
            give_back(self.device)
        return np.concatenate([self.encode(half) for half in np.array_split(pixels, 2)])

    @torch.inference_mode()
    def _encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        with autocast:
            latents = self.vae.encode(to_input(batch))
        return latents.float().cpu().numpy()  # device sync


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
