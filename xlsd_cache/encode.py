"""uint8 pixels -> raw latents. Owns the range [-1,1], the dtype, the layout and the device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlsd_cache import Precision
from xlsd_cache.vae import Vae


def to_input(pixels: Tensor) -> Tensor:  # uint8 [B,H,W,3] -> f32 [B,3,H,W] in [-1,1]
    """What the VAE was trained on: 2 * (p / 255) - 1.

    Rounded and laid out (channels last in memory) as diffusers' VaeImageProcessor does it, so that
    latents equal diffusers' own to the last bit: the layout decides in what order kernels sum. On a
    CPU it is also the faster one.
    """
    return (2.0 * (pixels.permute(0, 3, 1, 2).float() / 255.0)) - 1.0


@dataclass(frozen=True)
class Encoder:
    """A VAE on its device, at its precision."""

    vae: Vae
    precision: Precision
    device: torch.device

    def __post_init__(self) -> None:
        self.vae.model.to(self.device)

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B,H,W,3] -> raw latents f32 [B,C,H/8,W/8], the posterior's mean."""
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        with autocast:
            latents = self.vae.encode(to_input(batch))
        return latents.float().cpu().numpy()  # waits for the device
