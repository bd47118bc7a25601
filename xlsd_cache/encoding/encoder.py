"""uint8 pixels -> raw latents. Owns the range [-1,1], the dtype and the layout."""

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
    """What the VAE was trained on: 2 * (p / 255) - 1.

    Rounded and laid out (channels last in memory) as diffusers' VaeImageProcessor does it, so that
    latents equal diffusers' own to the last bit: the layout decides in what order kernels sum. On a
    CPU it is also the faster one.
    """
    return (2.0 * (pixels.permute(0, 3, 1, 2).float() / 255.0)) - 1.0


@dataclass
class Encoder:
    """A VAE on its device, at its precision, and how it is called."""

    vae: Vae
    precision: Precision
    device: torch.device
    batch: int = 8  # images a call
    calls: int = 1  # at once
    _full_at: float = field(default=math.inf, init=False)  # pixels a call, which did not fit

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
        """Called in the way that is fastest for images of up to so many pixels.

        On a CPU that is one image to each core: threads that share a convolution wait for each
        other, and more images at once leave the cache. On a card it is the largest batch that
        fits, up to 32. A `batch` that is given is encoded in one call, with all threads.
        """
        if batch is not None:
            return cls(vae, precision, device, batch)
        # At full resolution about six fp32 tensors of the first width live at once.
        nbytes = 6 * 4 * pixels * vae.model.config["block_out_channels"][0]
        if device.type == "cuda":
            there = most_on(device) * 0.7
            return cls(vae, precision, device, 2 ** min(5, max(0, int(math.log2(there / nbytes)))))
        fitting = int(psutil.virtual_memory().available * 0.7 / nbytes)
        return cls(vae, precision, device, 1, max(1, min(torch.get_num_threads(), fitting)))

    @contextmanager
    def threads(self, spare: int) -> Iterator[ThreadPoolExecutor]:
        """Threads to call `encode` from, `spare` more than calls, which share torch's own."""
        if self.device.type == "cpu":
            _keep_freed_memory()
        before = torch.get_num_threads()
        each = (before // self.calls,)
        with ThreadPoolExecutor(self.calls + spare, "encoder", torch.set_num_threads, each) as pool:
            yield pool
        torch.set_num_threads(before)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B,H,W,3] -> raw latents f32 [B,C,H/8,W/8], the posterior's mean.

        A batch that the card has no room for is encoded in halves, and so are all that are as
        large. Raises UserError where it has none for a single image: tiles would fit, but their
        latents are others near every seam.
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
                        f"the card has no room to encode one image of {width}x{height}; free some "
                        f"of its memory, lower --resolution, or use --device cpu"
                    ) from error
            log.info(
                f"{count} images of {width}x{height} do not fit the card; from here on it encodes "
                f"half as many at once"
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
        return latents.float().cpu().numpy()  # waits for the device


def _keep_freed_memory() -> None:
    """Have glibc keep what one layer frees for the next, in one heap for all threads.

    Else it gives pages back after every layer and is given zeroed ones again, which took an eighth
    of the time of a small VAE. Nothing where the C library is another.
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
